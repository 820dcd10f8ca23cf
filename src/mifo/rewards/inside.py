"""What runs inside a sandbox: the checker of a coding answer, and the program it checks, in two processes.

The checker runs the tests and never a line of the program; the program runs in a process of its own and is called over a
pipe, with plain values in both directions. So nothing that the program does to its interpreter (patching `assert`, leaving
with status 0, printing what success prints, comparing equal to everything) reaches the process that decides: it can only
return values, and they must pass the tests. What the program cannot see it cannot copy: the tests never enter its process.

Standard library alone, no import of the project: `sandbox` hands this text to an interpreter that can see neither. Messages
are lines of JSON. See `code` for what is not covered.
"""

import ast
import builtins
import collections
import ctypes
import decimal
import fractions
import json
import os
import resource
import sys

MAX_LINE = 8 << 20
MAX_DIGITS = 50_000
MAX_ITEMS = 100_000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38


def main(job):
    """The one entry: `job` says which role, which limits, which user, and where the rest is."""
    if job["user"] is not None:  # the sandbox was made by root, and keeps no right but to become somebody else
        os.setgroups([])
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(MAX_DIGITS)
    sys.path[:] = [entry for entry in sys.path if entry] + job["path"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # what is in /proc of this process is not for processes of the same user
    filter_calls = filterer(libc, bytes.fromhex(job["filter"]))
    if job["role"] == "checker":
        filter_calls()
        checker(job["job"], job["verdict"])
    elif job["stdin"]:
        answer_inputs(filter_calls)
    else:
        filter_calls()
        answer_calls()


def filterer(libc, program):
    """A function that puts the process under a seccomp filter; one that does nothing for an empty filter."""

    def apply():
        if not program:
            return
        rules = ctypes.create_string_buffer(program, len(program))
        header = (len(program) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(rules).to_bytes(8, sys.byteorder)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the kernel takes no system call filter")

    return apply


# --- plain values ------------------------------------------------------------------------------------------------------

SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "iterator": iter}
TEXTS = {"decimal": decimal.Decimal, "fraction": fractions.Fraction, "float": float, "complex": complex}


class Opaque:
    """A value that cannot cross: equal to nothing, without length, order or elements."""

    __hash__ = None

    def __eq__(self, other):
        return False


def encode(value):
    """A value as JSON. Lists are lists; other types are objects with a tag; what is no plain value becomes opaque."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"t": "float", "v": repr(float(value))}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": "bytes", "v": bytes(value).decode("latin-1")}
    for name, kind in (*SEQUENCES.items(), *TEXTS.items()):
        if kind is not iter and isinstance(value, kind):
            return {"t": name, "v": [encode(v) for v in value] if name in SEQUENCES else str(value)}
    return encode_other(value)


def encode_other(value):
    """Ranges, iterators (at most MAX_ITEMS), and numpy's scalars and arrays."""
    if isinstance(value, range):
        return {"t": "range", "v": [value.start, value.stop, value.step]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    if hasattr(value, "__next__"):
        items = []
        for item in value:
            items.append(encode(item))
            if len(items) > MAX_ITEMS:
                return {"t": "opaque"}
        return {"t": "iterator", "v": items}
    return {"t": "opaque"}


def decode(value):
    """The value of `encode`, of exact built-in types. Raises for anything else."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value["t"]
    if kind == "dict":
        return {decode(k): decode(v) for k, v in value["v"]}
    if kind == "bytes":
        return value["v"].encode("latin-1")
    if kind == "range":
        return range(*value["v"])
    if kind in SEQUENCES:
        return SEQUENCES[kind]([decode(item) for item in value["v"]])
    if kind in TEXTS:
        return TEXTS[kind](value["v"])
    return Opaque()


# --- the program's side ------------------------------------------------------------------------------------------------


def take_pipes():
    """The two ends of the conversation; the program itself gets an empty input and a place for what it prints."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    return requests, replies


def say(replies, message):
    """One line of JSON to the checker."""
    replies.write(json.dumps(message).encode("ascii") + b"\n")
    replies.flush()


def failure(error):
    """What a program raised: the names of its class and of those above it, and its text."""
    return {"raise": [kind.__name__ for kind in type(error).__mro__], "text": str(error)[:500]}


def answer_calls():
    """Runs the program once, then every call that is asked of it."""
    requests, replies = take_pipes()
    say(replies, {"ready": True})
    namespace = {"__name__": "program"}
    try:
        exec(compile(json.loads(requests.readline())["program"], "<program>", "exec"), namespace)
        loaded = {"value": None}
    except BaseException as error:
        loaded = failure(error)
    say(replies, loaded)
    for line in iter(requests.readline, b""):
        message = json.loads(line)
        try:
            arguments = [decode(item) for item in message["arguments"]]
            named = {name: decode(item) for name, item in message["named"].items()}
            reply = {"value": encode(eval(message["call"], namespace)(*arguments, **named))}
            json.dumps(reply)
        except BaseException as error:
            reply = failure(error)
        say(replies, reply)


def answer_inputs(filter_calls):
    """Runs the program afresh for every input, in a child with the input as its standard input."""
    requests, replies = take_pipes()
    say(replies, {"ready": True})
    program = json.loads(requests.readline())["program"]
    say(replies, {"value": None})
    for line in iter(requests.readline, b""):
        given, printed = (
            os.memfd_create("input"),
            os.memfd_create("output"),
        )  # files: no pipe to fill, and of bounded size
        os.write(given, json.loads(line)["input"].encode("utf-8", "surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
        child = os.fork()
        if child == 0:
            requests.close()
            replies.close()
            run_program(program, given, printed, filter_calls)
        _, status = os.waitpid(child, 0)
        text = os.pread(printed, 4 << 20, 0).decode("utf-8", "replace")
        os.close(given)
        os.close(printed)
        say(replies, {"value": text} if status == 0 else {"raise": ["RuntimeError"], "text": f"status {status}"})


def run_program(program, given, printed, filter_calls):
    """In the child: the program as a main module. Never returns."""
    status = 1
    try:
        os.dup2(given, 0)
        os.dup2(printed, 1)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the rest of the process
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        filter_calls()
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as leaving:
        status = 0 if leaving.code in (None, 0) else 1
    except BaseException:
        status = 1
    finally:
        try:
            sys.stdout.flush()
        except BaseException:
            status = 1
        os._exit(status)


# --- the checker's side ------------------------------------------------------------------------------------------------


class ProgramEnded(BaseException):
    """The program's process is gone, or said what is no reply. Not an Exception, so that no test catches it."""


class TestsUnusable(BaseException):
    """The tests ask for what cannot be done here; nothing is known about the program."""


class Program:
    """The program's process, seen from the checker."""

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies
        self.calls, self.ended, self.raised = 0, False, None

    def start(self, text):
        if self.replies.readline(MAX_LINE) != b'{"ready": true}\n':
            raise TestsUnusable("the program's process did not start")
        self.ask({"program": text})
        self.calls = 0

    def ask(self, message):
        """One question and its answer as a plain value; raises what the program raised."""
        self.calls += 1
        try:
            self.requests.write(json.dumps(message).encode("ascii") + b"\n")
            self.requests.flush()
            line = self.replies.readline(MAX_LINE)
            reply = json.loads(line) if line.endswith(b"\n") else None
            names = reply.get("raise")
            value = None if names else decode(reply["value"])
        except Exception as error:
            self.ended = True
            raise ProgramEnded from error
        if names:
            self.raised = program_error(names, str(reply.get("text")))
            raise self.raised
        return value


def program_error(names, text):
    """The nearest built-in exception of what the program raised, so that tests which expect it can catch it."""
    for name in names:
        kind = vars(builtins).get(name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and kin want more than a text
                continue
    return RuntimeError(text)


def remote(program, expression):
    """A function that calls `expression` in the program's process."""

    def call(*arguments, **named):
        message = {
            "call": expression,
            "arguments": [sendable(value) for value in arguments],
            "named": {name: sendable(value) for name, value in named.items()},
        }
        return program.ask(message)

    call.__name__ = call.__qualname__ = expression
    return call


def sendable(value):
    """An argument as JSON. Raises TestsUnusable for one that is not plain."""
    encoded = encode(value)
    if '{"t": "opaque"}' in json.dumps(encoded):  # in a text the quotes would be escaped
        raise TestsUnusable(f"the tests call the program with a value of type {type(value).__name__}")
    return encoded


def checker(job_file, verdict_file):
    """Runs the tests of the job and writes the verdict; nothing that is printed counts."""
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    requests, replies = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    program = Program(requests, replies)
    verdict, why = judge(program, job)
    os.write(verdict_file, json.dumps({"verdict": verdict, "why": why[:300]}).encode("ascii"))
    os._exit(0)


def judge(program, job):
    """(verdict, why). Errors before the first call are the tests' own; later ones are the program's, with exceptions."""
    try:
        program.start(job["program"])
    except (ProgramEnded, Exception) as error:
        return "wrong", f"the program does not load: {error!r}"
    except TestsUnusable as error:
        return "error", str(error)
    try:
        run_cases(program, job) if job["cases"] is not None else run_tests(program, job)
    except TestsUnusable as error:
        return "error", str(error)
    except (AssertionError, ProgramEnded) as error:
        return ("wrong", f"{error!r}") if program.calls else ("error", f"the tests fail by themselves: {error!r}")
    except BaseException as error:
        own = error is not program.raised and isinstance(error, (NameError, ImportError, SyntaxError))
        return (
            ("error", f"the tests fail by themselves: {error!r}")
            if own or not program.calls
            else ("wrong", f"{error!r}")
        )
    if program.ended:
        return "wrong", "the program ended"
    return ("correct", "") if program.calls else ("error", "the tests never call the program")


def run_tests(program, job):
    """Tests as code: asserts, or a function `check` that is given the program's function."""
    scope = {"__name__": "tests"}
    exec(compile(job["setup"], "<setup>", "exec"), scope)
    tree = ast.parse(job["test"])
    entry = job["entry_point"]
    for name in {entry} if entry else free_names(tree) - set(scope):
        scope[name] = remote(program, name)
    if entry:
        scope["candidate"] = scope[entry]
    exec(compile(tree, "<tests>", "exec"), scope)
    if entry and callable(scope.get("check")):
        scope["check"](scope[entry])


def free_names(tree):
    """Names that the tests use and nobody defines: they must be the program's."""
    used, bound = set(), set(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound


def run_cases(program, job):
    """Tests as data: arguments and a result, or an input and an output."""
    if not job["cases"]:
        raise TestsUnusable("there are no test cases")
    for given, expected in job["cases"]:
        if job["entry_point"]:
            result = remote(program, job["entry_point"])(*given)
            assert same_result(result, expected), "another result"
        else:
            assert same_output(program.ask({"input": given}), expected), "another output"


def same_result(result, expected):
    """Equality after JSON, which knows no tuples and only texts as keys."""
    return result == expected or as_json(result) == as_json(expected)


def as_json(value):
    """A value as it would come back from JSON."""
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    return value


def same_output(printed, expected):
    """The same words, white space aside; numbers may be spelled in two ways (0.50 is 0.5)."""
    left, right = printed.split(), expected.split()
    return len(left) == len(right) and all(a == b or same_number(a, b) for a, b in zip(left, right, strict=True))


def same_number(left, right):
    """Whether two words spell one decimal number."""
    if max(len(left), len(right)) > 100:
        return False
    try:
        return decimal.Decimal(left) == decimal.Decimal(right)
    except decimal.InvalidOperation:
        return False


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
