"""Stopping without a training: small programs that end as the scripts do."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.shared.processes import ROOT
from tests.shared.runs import environment
from trainers import run as run_module
from trainers.errors import Interrupted
from trainers.run import run
from trainers.training import callbacks, process_state
from trainers.training.checkpoint import read_checkpoint
from trainers.training.process_state import STOP_SIGNALS, StopRequest

PROGRAM = """
import atexit, multiprocessing, os, signal, sys, time
from trainers.cli import run_main
from trainers.errors import UserError
from trainers.training import process_state
from trainers.training.process_state import stop_request

def say(word):
    print(word, flush=True)

def main():
    {body}

status = run_main(main)
{end}
sys.exit(status)
"""
SLEEP = "say(os.getpid()); time.sleep(60)"
MISTAKE = "say(os.getpid()); raise UserError('seed: is wrong')"
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"


def arguments(body, end=""):
    return ["-c", PROGRAM.format(body=body, end=end)]


class Program:
    """A program that has printed the process id of what is to be stopped."""

    def __init__(self, command, **variables):
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT), **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = int(self.process.stdout.readline())

    def send(self, number):
        os.kill(self.pid, number)
        return self.end()

    def end(self):
        """Its exit status and what it told since."""
        out, error = self.process.communicate(timeout=30)
        return self.process.returncode, out + error


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_the_work_begins_ends_it_in_one_line(number):
    told = f"stopped by signal {int(number)}\n"
    assert Program(arguments(SLEEP)).send(number) == (128 + number, told)


def test_only_the_first_process_tells_that_a_signal_came():
    assert Program(arguments(SLEEP), RANK="1").send(signal.SIGTERM) == (143, "")


def test_no_library_swallows_a_signal():
    body = """
    try:
        say(os.getpid())
        time.sleep(60)
    except BaseException:
        time.sleep(60)"""
    ended = Program(arguments(body)).send(signal.SIGTERM)
    assert ended == (143, "stopped by signal 15\n")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_the_interpreter_ends_makes_no_traceback(number):
    end = "atexit.register(lambda: (say(os.getpid()), time.sleep(60)))"
    told = f"stopped by signal {int(number)}\n"
    assert Program(arguments("pass", end)).send(number) == (128 + number, told)


def test_a_signal_in_the_last_moments_of_the_interpreter_leaves_its_status():
    end = """
class Late:
    def __del__(self, write=os.write, sleep=time.sleep, line=b"%d" % os.getpid()):
        write(1, line + b"\\n")
        sleep(1)

late = Late()"""
    assert Program(arguments("pass", end)).send(signal.SIGTERM) == (0, "")


def test_a_mistake_is_the_last_word_even_when_a_signal_follows():
    end = "say('told'); time.sleep(60)"
    program = Program(arguments(MISTAKE, end))
    assert program.process.stdout.readline() == "told\n"
    assert program.send(signal.SIGTERM) == (143, "seed: is wrong\n")


@pytest.mark.parametrize("ended_by_launcher", [True, False])
def test_a_mistake_of_all_processes_of_a_machine_is_told_by_the_first(ended_by_launcher):
    """The launcher ends the second one once the first has ended; without one it tells it too."""
    program = Program(arguments(MISTAKE), LOCAL_RANK="1", RANK="1")
    if ended_by_launcher:
        time.sleep(0.5)
        assert program.send(signal.SIGTERM) == (143, "")
    else:
        assert program.end() == (2, "seed: is wrong\n")


@pytest.mark.parametrize("variable", process_state.LAUNCHER_VARIABLES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_process_whose_launcher_ends_stops(variable, number):
    program = Program(["-c", LAUNCHER, *arguments(SLEEP)], **{variable: "no"})
    program.process.send_signal(number)
    assert program.end() == (-number, "stopped by signal 15\n")


def test_what_breaks_together_with_the_launcher_is_no_fault():
    """Such as a connection to it, before its end was noticed."""
    body = f"""
    process_state.WATCH_SECONDS = 60
    time.sleep({2 * process_state.WATCH_SECONDS})
    parent = os.getppid()
    say(os.getpid())
    while os.getppid() == parent:
        time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")"""
    program = Program(["-c", LAUNCHER, *arguments(body)], TORCHELASTIC_RUN_ID="1")
    program.process.kill()
    assert program.end() == (-9, "stopped by signal 15\n")


@pytest.mark.parametrize("variables", [{}, {"ACCELERATE_MIXED_PRECISION": "bf16"}])
def test_a_process_that_outlives_the_shell_that_started_it_goes_on(variables):
    body = f"say(os.getpid()); time.sleep({4 * process_state.WATCH_SECONDS}); say('done')"
    program = Program(["-c", LAUNCHER, *arguments(body)], **variables)
    program.process.kill()
    assert program.end() == (-9, "done\n")


@pytest.mark.parametrize(
    ("variables", "ended"),
    [({}, (0, "")), ({"TORCHELASTIC_RUN_ID": "1"}, (129, "stopped by signal 1\n"))],
    ids=["alone", "under torchrun, which forwards it and then kills"],
)
def test_nohup_keeps_a_hangup_away(variables, ended):
    hidden = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    hidden += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    body = "say(os.getpid()); time.sleep(1)"
    assert Program(["-c", hidden, *arguments(body)], **variables).send(signal.SIGHUP) == ended


def test_a_forked_worker_ends_by_a_signal_as_if_none_were_bound():
    body = """
    stop_request.waits_for_step = True
    # Python drops what is sent to a fork before it runs: the worker itself says that it does
    work = lambda: (say(os.getpid()), time.sleep(60))
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    say(worker.exitcode)
    say(stop_request.signal_number)"""
    assert Program(arguments(body)).send(signal.SIGTERM) == (0, "-15\n0\n")


def test_the_first_process_of_a_container_is_stopped_too():
    """The system keeps from it what it has not bound, as a TERM from `docker stop`."""
    namespace = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no namespace of process ids can be made here")
    command = "import os, sys; os.execvp('unshare', sys.argv[1:])"
    program = Program(["-c", command, *namespace, sys.executable, *arguments(SLEEP)])
    assert program.pid == 1
    children = f"/proc/{program.process.pid}/task/{program.process.pid}/children"
    with open(children) as file:
        program.pid = int(file.read())
    assert program.send(signal.SIGTERM) == (143, "stopped by signal 15\n")


def test_a_request_that_arrives_twice_is_one_and_a_second_one_does_not_wait():
    request = StopRequest()
    request.process, request.waits_for_step = os.getpid(), True
    request.handle(signal.SIGTERM, None)
    request.handle(signal.SIGTERM, None)  # such as a launcher's, beside the scheduler's own
    assert request.signal_number == signal.SIGTERM
    request.requested_at -= 2 * process_state.REPEAT_SECONDS
    with pytest.raises(Interrupted):
        request.handle(signal.SIGINT, None)


def test_a_run_in_a_thread_leaves_the_handlers_alone(settings):
    before, failures = [signal.getsignal(number) for number in STOP_SIGNALS], []

    def work():
        try:
            run(settings("train.max_train_steps=1"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert read_checkpoint(settings().output_dir / "checkpoints/step-000001")


def test_a_signal_while_a_checkpoint_is_written_stops_after_that_step(settings, monkeypatch):
    save, steps = callbacks.save_checkpoint, []

    def signalled(config, task, accelerator, state, prune):
        signal.raise_signal(signal.SIGTERM)
        save(config, task, accelerator, state, prune)
        steps.append(state.step)

    monkeypatch.setattr(callbacks, "save_checkpoint", signalled)
    with pytest.raises(Interrupted, match="; the same command goes on from the checkpoint"):
        run(settings())
    assert steps == [2]
    assert read_checkpoint(settings().output_dir / "checkpoints/step-000002")


@pytest.mark.parametrize(
    ("steps", "advice"),
    [
        (0, "there is no checkpoint yet: .* starts from step 0"),
        (2, "the checkpoint step-000002 is intact"),
    ],
)
def test_a_signal_while_the_model_loads_tells_what_there_is(settings, monkeypatch, steps, advice):
    if steps:
        run(settings(f"train.max_train_steps={steps}"))

    def build(*_):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setitem(run_module.TASKS, "dreambooth", build)
    threads = threading.active_count()
    with pytest.raises(Interrupted, match=f"stopped by signal 15; {advice}"):
        run(settings())
    assert threading.active_count() == threads
