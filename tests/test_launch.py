"""The scripts of launch/: what they would start is what the front door understands."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from stare_jax import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def understood(arguments: list[str]) -> dict:
  """The front door's flags after parsing, in a process of their own as absl's flags are global."""
  code = ("import json, sys\nfrom stare_jax import main\nmain.parse(sys.argv)\n"
          "print(json.dumps([main.DISTRIBUTED.value, main.NUM_PROCESSES.value, main.PROCESS_ID.value,\n"
          "main.WORKDIR.value, main.CONFIG.value.preset, main.CONFIG.value.seed,\n"
          "main.wrong_processes(main.DISTRIBUTED.value, main.NUM_PROCESSES.value, main.PROCESS_ID.value)]))")
  done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  names = ("distributed", "num_processes", "process_id", "workdir", "preset", "seed", "wrong")
  return dict(zip(names, yaml.safe_load(done.stdout), strict=True))


def command_of(words: list[str]) -> list[str]:
  """The arguments behind `python -m stare_jax.main`."""
  at = words.index("stare_jax.main")
  assert words[at - 2 : at] == [".venv/bin/python", "-m"]
  return words[at + 1 :]


def fake(folder: pathlib.Path, name: str, script: str) -> None:
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{script}\n")
  path.chmod(0o755)


def checkout(folder: pathlib.Path) -> pathlib.Path:
  """launch/ in a folder whose Python only writes down what it is asked to run, and whose set-up is done."""
  shutil.copytree(LAUNCH, folder / "launch")
  (folder / "launch" / "setup.sh").write_text('echo "setup $STARE_ACCELERATOR $*" >>"$CALLS"\n')
  (folder / ".venv" / "bin").mkdir(parents=True)
  fake(folder / ".venv" / "bin", "python", """
printf "%q " .venv/bin/python "$@" >>"$CALLS"; echo >>"$CALLS"
for i in ${STATUS:-}; do [ "$i" = "${SLURM_PROCID:-0}:${i#*:}" ] && exit "${i#*:}"; done; exit 0""")
  return folder


def run(script: pathlib.Path, cwd: pathlib.Path, *arguments: str, status: int = 0, **variables: str) -> list[list[str]]:
  """The commands that were called, as words; the script ends with `status`."""
  calls = cwd / "calls"
  env = {"PATH": f"{cwd / 'bin'}:/usr/bin:/bin", "HOME": str(cwd), "CALLS": str(calls), **variables}
  done = subprocess.run(["bash", str(script), *arguments], cwd=cwd, env=env, capture_output=True, text=True)
  assert done.returncode == status, done.stdout + done.stderr
  return [shlex.split(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
  done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
  done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("variables", "fraction"), [
  ({"CONFIG": "configs/ipi.py:smoke"}, []),  # JAX's own share
  ({"CONFIG": "configs/ipi.py:openvla_7b_lora"}, ["0.92"]),  # 66 GiB of 80 GB
  ({"CONFIG": "configs/ipi.py:openvla_7b_lora", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.8"}, ["0.8"]),  # the user's counts
  ({"CONFIG": "configs/ipi.py:openvla_7b_lora", "XLA_CLIENT_MEM_FRACTION": "0.8"}, []),  # so does its newer name
])  # fmt: skip
def test_one_gpu_of_80_gb_is_enough_for_7b(variables, fraction, tmp_path):
  here = checkout(tmp_path)
  (here / "launch" / "setup.sh").write_text('echo "memory ${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" >>"$CALLS"\n')
  memory, _ = run(here / "launch" / "one_gpu.sh", here, **variables)
  assert memory == ["memory", *fraction]


def test_one_gpu(tmp_path):
  here = checkout(tmp_path)
  setup, main = run(here / "launch" / "one_gpu.sh", here, "--config.seed=5", CONFIG="configs/ipi.py:smoke")
  assert setup == ["setup", "cuda13"]
  found = understood(["main", *command_of(main)])
  assert (found["distributed"], found["preset"], found["seed"], found["workdir"]) == ("off", "smoke", 5, "")
  for told, wanted in (("cuda12", "cuda12"), ("cpu", "cuda13")):  # what set-up was told before stays
    (here / ".venv" / "stare_jax_accelerator").write_text(f"{told}\n")
    assert run(here / "launch" / "one_gpu.sh", here)[-2] == ["setup", wanted]


def slurm(folder: pathlib.Path) -> pathlib.Path:
  """A checkout with a stand-in for srun, which starts the tasks one after another with the variables that Slurm gives
  each and ends with the highest status; that of task i is where STATUS says i:status."""
  here = checkout(folder)
  (here / "bin").mkdir()
  fake(here / "bin", "scontrol", """
if [ "$1" = requeue ]; then printf "%q " scontrol "$@" >>"$CALLS"; echo >>"$CALLS"
else [ "$1 $2 $3" = "show hostnames gpu[07-09]" ] && printf "gpu07\\ngpu08\\ngpu09\\n"; fi""")
  fake(here / "bin", "srun", """
echo "$SRUN_CPUS_PER_TASK" >"$CALLS.cores"
tasks=$SLURM_NTASKS worst=0
while [[ $1 == -* ]]; do case $1 in --ntasks=*) tasks=${1#*=} ;; esac; shift; done
for ((i = 0; i < tasks; i++)); do
  status=0; SLURM_PROCID=$i "$@" || status=$?; ((status > worst)) && worst=$status
done
exit $worst""")
  return here


SLURM = dict(SLURM_JOB_NODELIST="gpu[07-09]", SLURM_NTASKS="3", SLURM_JOB_ID="4711", SLURM_CPUS_PER_TASK="48")


def test_slurm_starts_one_process_per_node_with_its_number(tmp_path):
  here = slurm(tmp_path)
  calls = run(
    here / "launch" / "slurm.sbatch", here, "--config.seed=5", "--config.sim.num_envs=36", SLURM_SUBMIT_DIR=str(here),
    WORKDIR="runs/with a space", **SLURM,
  )  # fmt: skip
  assert calls[:4] == [["setup", "cuda13", "--no-rendering"], *[["setup", "cuda13"]] * 3]
  found = [understood(["main", *command_of(call)]) for call in calls[4:]]
  assert [f["process_id"] for f in found] == [0, 1, 2]
  for f in found:
    assert (f["distributed"], f["num_processes"], f["wrong"]) == ("gpu07:8476", 3, "")
    assert (f["workdir"], f["seed"]) == ("runs/with a space", 5)


@pytest.mark.parametrize("statuses, requeue, status, again", [
  ("0:75 1:75 2:75", "1", 75, True),  # the time limit: all wrote a checkpoint
  ("0:75 1:75 2:75", "0", 75, False),
  ("0:3 1:137 2:3", "1", 137, False),  # one was killed
  ("0:2 1:3 2:3", "1", 3, False),  # a mistake comes again
])
def test_slurm_queues_a_stopped_run_again(tmp_path, statuses, requeue, status, again):
  here = slurm(tmp_path)
  script = here / "launch" / "slurm.sbatch"
  calls = run(script, here, SLURM_SUBMIT_DIR=str(here), STATUS=statuses, REQUEUE=requeue, status=status, **SLURM)
  assert len([call for call in calls if "stare_jax.main" in call]) == 3  # one that ends does not end the others
  assert (calls[-1] == ["scontrol", "requeue", "4711"]) == again
  assert again or "scontrol" not in {call[0] for call in calls}
  options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.read_text().splitlines()
                 if line.startswith("#SBATCH"))  # fmt: skip
  assert "requeue" in options and options["open-mode"] == "append" and options["signal"].startswith("TERM@")
  assert (here / "calls.cores").read_text() == "48\n"  # srun does not take them from sbatch's options by itself
  (started,) = re.findall(r"^srun --kill-on-bad-exit=0 --wait=(\d+)", script.read_text(), re.MULTILINE)
  assert int(started) > main.HEARTBEAT.default  # by then the others have noticed one that fell silent


@pytest.fixture
def pod(tmp_path):
  """A stand-in for gcloud runs what it would send to a worker; there, sudo and git only write down their calls, and
  make folders."""
  here = checkout(tmp_path)
  (here / "bin").mkdir()
  worker = here / "stare_jax"
  checkout(worker)
  (worker / ".git").mkdir()
  fake(here / "bin", "gcloud", """
for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; --worker=all) all=1 ;; esac; done
[ "${all:-}" = 1 ] && exec bash -c "$command" """)
  for name in ("sudo", "git"):
    fake(here / "bin", name, f"""
printf "%q " {name} "$@" >>"$CALLS"; echo >>"$CALLS"
case $1 in mkdir | install) exec "$@" ;; esac""")
  fake(here / "bin", "mountpoint", "exit 1")
  return here


def pod_variables(here: pathlib.Path) -> dict[str, str]:
  return dict(TPU="pod", ZONE="zone", NFS="10.0.0.2:/share", REPOSITORY="host:repository", COMMIT="abc", RUN="a run",
              MOUNT=str(here / "the share"))  # fmt: skip


def test_tpu_workers_get_one_command(pod):
  calls = run(pod / "launch" / "tpu_pod.sh", pod, "--config.seed=5", **pod_variables(pod))
  assert ["sudo", "mount", "-t", "nfs", "10.0.0.2:/share", str(pod / "the share")] in calls
  assert ["git", "checkout", "--quiet", "--detach", "abc"] in calls
  assert ["setup", "tpu", "--no-rendering"] in calls
  found = understood(["main", *command_of(calls[-1])])
  assert (found["distributed"], found["wrong"], found["seed"]) == ("auto", "", 5)
  assert found["workdir"] == f"{pod / 'the share'}/a run"


def test_tpu_workers_get_the_variables_of_set_up(pod):
  setup = pod / "stare_jax" / "launch" / "setup.sh"
  setup.write_text('echo "$PYTHON,$MS_ASSET_DIR,${STARE_TORCH_INDEX-}" >"$CALLS.set"\n')
  own = {"PYTHON": "python3.12", "MS_ASSET_DIR": "/mnt/stare_jax/the $assets"}
  run(pod / "launch" / "tpu_pod.sh", pod, **pod_variables(pod), **own)
  assert (pod / "calls.set").read_text() == "python3.12,/mnt/stare_jax/the $assets,\n"


def test_a_tpu_run_outlives_whoever_started_it(pod):
  """It is started once, whoever asks again sees its log, and its status comes back to who stayed."""
  fake(pod / "stare_jax" / ".venv" / "bin", "python", """
[ "$2" = stare_jax.main ] || exit 0
echo "$$ stare_jax.main" >>"$CALLS"; echo "said before"
until [ -e "$CALLS.end" ]; do sleep 0.05; done
echo "said after"; exit 75""")
  script, calls = pod / "launch" / "tpu_pod.sh", pod / "calls"
  env = {"PATH": f"{pod / 'bin'}:/usr/bin:/bin", "HOME": str(pod), "CALLS": str(calls), **pod_variables(pod)}
  command = functools.partial(subprocess.Popen, ["bash", str(script)], cwd=pod, env=env, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
  called = lambda what: [line for line in calls.read_text().splitlines() if what in line]
  try:
    with command() as first:
      assert first.stdout.readline() == "said before\n"
      os.killpg(first.pid, signal.SIGKILL)  # the laptop sleeps: all that it started there is gone
    (main,) = called("stare_jax.main")
    os.kill(int(main.split()[0]), 0)
    with command() as second:
      assert "a run is going on here" in second.stdout.readline()
      while second.stdout.readline() != "said before\n":
        assert second.poll() is None
      (pod / "calls.end").touch()
      assert second.stdout.read() == "said after\n"
    assert second.returncode == 0 and len(called("stare_jax.main")) == len(called("git checkout")) == 1
    with command() as third:  # of a run that is over: a new one, which ends at once
      assert third.stdout.read().splitlines() == ["said before", "said after"]
    assert third.returncode == 75 and len(called("stare_jax.main")) == 2
  finally:
    (pod / "calls.end").touch()
  (log,) = (pod / "the share" / "a run").glob("worker-*.log")
  assert log.read_text().count("said after") == 2


def test_jobset_pods_form_one_run():
  (jobset,) = yaml.safe_load_all((LAUNCH / "kubernetes_jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  env = {entry["name"]: entry["value"] for entry in container["env"]}
  assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == int(env["NUM_PROCESSES"])
  assert replicated["replicas"] == 1 and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  # Status 75 of any pod fails the job for a reason of its own, by which the JobSet starts it again without counting.
  stopped, drained = job["podFailurePolicy"]["rules"]
  assert stopped["action"] == "FailJob" and stopped["onExitCodes"] == {
    "containerName": container["name"], "operator": "In", "values": [main.STOPPED]
  }
  assert drained == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}
  policy = jobset["spec"]["failurePolicy"]
  (again,) = policy["rules"]
  assert again == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
  assert policy["maxRestarts"] > 0 and pod["terminationGracePeriodSeconds"] >= 60
  # The name of pod 0 follows from the names here; the service behind it is made where enableDNSHostnames says so.
  network = jobset["spec"]["network"]
  host, port = env["COORDINATOR"].split(":")
  assert network["enableDNSHostnames"]
  assert host == f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{network['subdomain']}"
  assert int(port) in [p["containerPort"] for p in container["ports"]]
  mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert set(mounts) == {volume["name"] for volume in pod["volumes"]} and env["WORKDIR"].startswith(mounts["runs"])

  bash, option, text = container["command"]
  assert (bash, option) == ("bash", "-c")
  assert set(re.findall(r"\$(\w+)", text)) == {*env, "JOB_COMPLETION_INDEX"}
  show = f'set -- {text.removeprefix("exec ")}; printf "%s\\n" "$@"'
  done = subprocess.run([bash, option, show], env=env | {"JOB_COMPLETION_INDEX": "1"}, capture_output=True, text=True)
  found = understood(["main", *command_of(done.stdout.splitlines())])
  assert (found["distributed"], found["num_processes"], found["process_id"]) == (env["COORDINATOR"], 2, 1)
  assert found["wrong"] == "" and found["workdir"] == env["WORKDIR"]

  more = env | {"JOB_COMPLETION_INDEX": "0", "ARGUMENTS": "--config.policy.checkpoint=/runs/openvla-7b --config.seed=5"}
  done = subprocess.run([bash, option, show], env=more, capture_output=True, text=True)
  arguments = command_of(done.stdout.splitlines())
  assert arguments[-2:] == more["ARGUMENTS"].split() and understood(["main", *arguments])["seed"] == 5


def test_an_unknown_accelerator_is_answered_before_anything_is_made(tmp_path):
  shutil.copytree(LAUNCH, tmp_path / "launch")
  (tmp_path / "requirements.txt").write_text("")
  env = {"PATH": "/usr/bin:/bin", "STARE_ACCELERATOR": "tpus"}
  done = subprocess.run(["bash", "launch/setup.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.returncode == 1 and "expected cpu, cuda12, cuda13 or tpu" in done.stderr
  assert not (tmp_path / ".venv").exists()
