"""Tables, files and figures made of what runs left behind; training never imports it."""
