"""One lesson in a process of its own: whatever it does there, the build goes on."""

import ctypes
import faulthandler
import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress

from course import LessonError, describe
from sphinx_gallery import gen_rst

PR_SET_PDEATHSIG = 1
LONGEST_LINE = 10_000  # Sphinx needs minutes for lines of a million characters


def generate(script, gallery, conf):
    """Let Sphinx-Gallery run the lesson and write its page. Return why it failed, or None."""
    describe(script)
    *_, result = gen_rst.generate_file_rst(script.name, gallery, script.parent, conf)
    if "formatted_exception" in result:
        # The frames of a traceback are indented, and the exception after them begins a line.
        trace = result["formatted_exception"]
        return re.sub(r"\ATraceback.*\n(  .*\n)*", "", trace).strip()
    page = (gallery / f"{script.stem}.rst").read_text(encoding="utf-8")
    longest = max(map(len, page.splitlines()))
    if longest > LONGEST_LINE:
        return f"it prints a line of {longest} characters"
    return None


class Child:
    """A lesson that is running. Once it has ``ended()``, ``failure`` says why it failed, or is None."""

    def __init__(self, script, gallery, conf, limit):
        self.script, self.limit = script, limit
        self.report = gallery / f"{script.stem}.report"  # empty: it went well
        self.report.unlink(missing_ok=True)
        self.start = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.run(gallery, conf)
        # What the lesson starts belongs to its group and is ended with it.
        with suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def run(self, gallery, conf):
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Prints where the lesson is and ends the process, whatever it waits for.
        faulthandler.dump_traceback_later(self.limit, exit=True, file=sys.__stderr__)
        try:
            failure = generate(self.script, gallery, conf)
        except LessonError as error:
            failure = str(error)
        except BaseException as error:  # SystemExit, too
            traceback.print_exc(file=sys.__stderr__)
            failure = "".join(traceback.format_exception_only(error)).strip()
        with suppress(BaseException):
            self.report.write_text(failure or "")
            sys.__stdout__.flush()
            sys.__stderr__.flush()
        os._exit(0)

    def ended(self):
        if (
            time.monotonic() > self.start + self.limit + 10
        ):  # not even faulthandler got on
            self.kill()
        if not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        self.kill()
        _, status = os.waitpid(self.pid, 0)
        self.failure = self.why(status)
        self.report.unlink(missing_ok=True)
        return True

    def why(self, status):
        if self.report.exists():
            return self.report.read_text() or None
        if time.monotonic() >= self.start + self.limit:
            return f"it took longer than lesson_limit, {self.limit} seconds: see above where it was"
        if os.WIFSIGNALED(status):
            return f"Python was ended by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"it ended Python, with status {os.WEXITSTATUS(status)}"

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
