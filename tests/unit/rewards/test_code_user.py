"""The sandbox as an ordinary user: with user namespaces it holds as root's does, without them the refusal says why.

The project's graders are copied to a folder that everybody can read, and run there by a Python that everybody can run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import mifo

NOBODY = 65534
PARTS = ("__init__.py", "errors.py", "types.py", "printable.py", "rewards", "data")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0,
    reason="only root can become another user; others run test_code.py itself",
)

LOSE_ROOT = f"""
import os
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
"""

JUDGE = """
import json, sys
from mifo.errors import RewardError
from mifo.rewards.code import Task
from mifo.rewards.sandbox import Sandbox
sandbox = Sandbox(seconds_per_answer=2.0, memory_mib=512, unsafe=False)
try:
    sandbox.require()
except RewardError as error:
    print(json.dumps({"refused": str(error)}))
    raise SystemExit
found = [sandbox.judge(Task(gold, program).job) for program, gold in json.load(sys.stdin)]
print(json.dumps({"confined": sandbox.confined, "found": [(f.verdict.value, f.why) for f in found]}))
"""

NO_NAMESPACES = """
import ctypes, os
assert ctypes.CDLL(None).unshare(0x10000000) == 0
print("ready", flush=True)
os.read(0, 1)
with open("/proc/sys/user/max_user_namespaces", "w") as setting:
    setting.write("0")
"""


@pytest.fixture(scope="module")
def python():
    """The command of a Python that an ordinary user can run."""
    for candidate in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        line = [candidate, "-c", "import sys; assert sys.version_info >= (3, 10)"]
        try:
            if subprocess.run(line, user=NOBODY, group=NOBODY, capture_output=True, check=False).returncode == 0:
                return candidate
        except OSError:
            continue
    pytest.skip("no Python 3.10 or later here that an ordinary user can run")


@pytest.fixture(scope="module")
def environment():
    """Where the graders lie, for everybody."""
    with tempfile.TemporaryDirectory(prefix="mifo-user-") as folder:
        Path(folder).chmod(0o755)
        home = Path(mifo.__file__).parent
        for part in PARTS:
            source, target = home / part, Path(folder) / "mifo" / part
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield {"PATH": os.environ["PATH"], "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "HF_TOKEN": "canary"}


def forgeries():
    text = Path(__file__).with_name("hostile_programs.txt").read_text(encoding="utf-8")
    parts = [part.partition("\n") for part in text.split("### ")[1:]]
    return [program for heading, _, program in parts if heading.startswith("forgery: ")]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_an_ordinary_user_gets_the_same_sandbox(python, environment):
    peeks = {
        "open('/etc/passwd').read()": "FileNotFoundError",
        "open('/proc/1/environ').read()": "Error",
        "open('/usr/x', 'w')": "Error",
        "os.fork()": "PermissionError",
        "os.setuid(0)": "Error",
        "__import__('socket').socket()": "PermissionError",
        "'<%s>' % (set(os.environ) & {'HF_TOKEN', 'PYTHONPATH', 'PATH'})": "<{'PATH'}>",
        "[line for line in open('/proc/self/status') if line.startswith('CapEff')]": "0000000000000000",
    }
    jobs = [("def f(x):\n    return 2 * x", "assert f(2) == 4"), ("def f(x):\n    return 3 * x", "assert f(2) == 4")]
    jobs += [(f"import os\ndef f():\n    return str({peek})", "raise AssertionError(f())") for peek in peeks]
    forged = [(program, "assert f(2) == 5, 'no program gives 5 honestly'") for program in forgeries()]
    assert len(forged) > 15
    done = subprocess.run(
        [python, "-c", LOSE_ROOT + JUDGE],
        input=json.dumps(jobs + forged),
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "refused" in answer:
        pytest.skip(answer["refused"])  # what it must say is the next test's
    assert answer["confined"]
    right, wrong, *rest = answer["found"]
    assert (right[0], wrong[0]) == ("correct", "wrong")
    for (verdict, why), (peek, expected) in zip(rest, peeks.items(), strict=False):
        assert verdict == "wrong", (peek, why)
        assert expected in why, peek
    assert {verdict for verdict, _ in rest[len(peeks) :]} <= {"wrong", "timeout"}


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_without_user_namespaces_the_refusal_says_so(python, environment):
    """In a user namespace that allows no further ones; root of the machine writes its map, as newuidmap would."""
    process = subprocess.Popen(
        [python, "-c", NO_NAMESPACES + LOSE_ROOT + JUDGE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=environment,
        text=True,
    )
    if process.stdout.readline() != "ready\n":
        pytest.skip(f"no user namespace can be made here: {process.communicate()[1]}")
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536\n")
    out, errors = process.communicate("\n[]", timeout=60)
    assert process.returncode == 0, errors
    message = json.loads(out)["refused"]
    for part in (
        "bubblewrap cannot start here (bwrap: ",
        "An ordinary user must be allowed to make user namespaces: here user.max_user_namespaces = 0 (sysctl)",
        "--unsafe-code-execution",
    ):
        assert part in message
    assert "Traceback" not in message
    assert "apt-get" not in message  # it is installed


def test_root_without_its_rights_is_told_which():
    """Root of a user namespace of one user, as in some containers, cannot become the user that programs run as."""
    sandbox = "from mifo.rewards.sandbox import Sandbox\nSandbox(seconds_per_answer=3, memory_mib=512, unsafe=False).require()"
    unshare, bubblewrap = shutil.which("unshare"), shutil.which("bwrap")
    if unshare is None or bubblewrap is None:
        pytest.skip("needs unshare and bubblewrap")
    source = str(Path(mifo.__file__).parents[1])
    done = subprocess.run(
        [unshare, "--user", "--map-root-user", sys.executable, "-c", sandbox],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    last = done.stderr.strip().splitlines()[-1]
    assert "bubblewrap cannot start here (" in last
    assert "As root it needs CAP_SYS_ADMIN" in last
