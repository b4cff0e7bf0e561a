"""Makes SAPIEN able to render: finds a Vulkan device, installs Mesa where root allows, else says what to do.

  python launch/rendering.py            # detect, install if needed (root on Debian/Ubuntu), detect again
  python launch/rendering.py --check    # detect only; exit status 1 when nothing can render

What was found is remembered in the virtual environment until the machine's Vulkan drivers or SAPIEN change.

SAPIEN 3 needs a Vulkan device with VK_KHR_external_memory_fd. A GPU's driver has it; on a machine without a GPU
the device is Mesa's lavapipe, 24.3 or newer. (VK_KHR_external_semaphore_fd, which SAPIEN 2.2 insists on, is not
listed by every lavapipe of 25.0.7; SAPIEN 3 renders without.) Debian 12 ships 22.3, its backports a newer one.
Where the backports are is derived from the machine's own package sources (same mirror, same signing key).
Standard library only: this runs before our packages are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

NEEDED_MESA = "24.3"
DRIVER = "mesa-vulkan-drivers"
# What the SAPIEN and OpenCV wheels link against and a slim image lacks; apt keeps what is already there.
LIBRARIES = ("libvulkan1", "libx11-6", "libgl1", "libegl1", "libglib2.0-0")
APT = pathlib.Path("/etc/apt")
ADDED = APT / "sources.list.d" / "stare-jax-backports.sources"
PROBE_SECONDS = 180
DRIVER_FOLDERS = ("/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d")
STAMP = pathlib.Path(sys.prefix) / "stare_jax_rendering"

PROBE = """
import sys
import cv2, sapien
from sapien.physx import PhysxCpuSystem
from sapien.render import RenderSystem

def render(device):
  scene = sapien.Scene([PhysxCpuSystem(), RenderSystem(sapien.Device(device))])
  scene.set_ambient_light([1, 1, 1])
  box = scene.create_actor_builder()
  box.add_box_visual(half_size=[0.5, 0.5, 0.5])
  box.build_static()
  camera = scene.add_camera("probe", 16, 16, 1.0, 0.1, 10.0)
  camera.entity.set_pose(sapien.Pose([-3, 0, 0]))
  scene.update_render()
  camera.take_picture()
  return camera.get_picture("Color")[..., :3].max() > 0

errors = []
for device in ("cuda", "cpu"):
  try:
    if render(device):
      print("device:", device)
      sys.exit(0)
    errors.append(f"{device}: the image is black")
  except RuntimeError as error:
    errors.append(f"{device}: {error}")
sys.exit("; ".join(errors))
"""


ONE_LINE = re.compile(
  r"deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<components>[^#]*)")


class RenderingError(RuntimeError):
  """Nothing on this machine can render, and this script could not change that; the message says what can."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One enabled binary entry of the machine's package sources."""

  uris: tuple[str, ...]
  suites: tuple[str, ...]
  components: tuple[str, ...]
  signed_by: str = ""  # a path, or an inline key block with its continuation lines; empty: apt's trusted keys
  trusted: str = ""

  def with_suite(self, suite: str, components: tuple[str, ...]) -> str:
    """The deb822 text of the same archive at another suite."""
    fields = {"Types": "deb", "URIs": " ".join(self.uris), "Suites": suite,
              "Components": " ".join(components), "Signed-By": self.signed_by, "Trusted": self.trusted}
    gap = {name: "" if value.startswith("\n") else " " for name, value in fields.items()}
    return "".join(f"{name}:{gap[name]}{value}\n" for name, value in fields.items() if value)


def parse_one_line(text: str) -> list[Source]:
  """Reads the one-line format: `deb [signed-by=/usr/share/keyrings/x.gpg] URI SUITE COMPONENT...`."""
  found = []
  for line in text.splitlines():
    match = ONE_LINE.match(line.strip())
    if match:
      options = dict(o.split("=", 1) for o in (match["options"] or "").split() if "=" in o)
      found.append(Source((match["uri"],), (match["suite"],), tuple(match["components"].split()),
                          options.get("signed-by", "").replace(",", " "), options.get("trusted", "")))
  return found


def parse_deb822(text: str) -> list[Source]:
  """Reads the deb822 format: stanzas of `Field: value`, continued by lines that start with a blank."""
  found = []
  lines = [line for line in text.splitlines() if not line.startswith("#")]
  for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
      if line[:1] in (" ", "\t") and name:
        fields[name] += "\n" + line
      elif ":" in line:
        name, value = line.split(":", 1)
        name = name.strip().lower()
        fields[name] = value.strip()
    words = {name: tuple(value.split()) for name, value in fields.items()}
    if "deb" in words.get("types", ()) and fields.get("enabled", "yes").lower() not in ("no", "false", "0"):
      found.append(Source(words.get("uris", ()), words.get("suites", ()), words.get("components", ()),
                          fields.get("signed-by", ""), fields.get("trusted", "")))
  return found


def sources(apt: pathlib.Path = APT) -> list[Source]:
  """Every enabled binary entry under apt's configuration folder, both formats."""
  found = []
  one_line = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
  for path in one_line:
    if path.is_file():
      found += parse_one_line(path.read_text())
  for path in sorted((apt / "sources.list.d").glob("*.sources")):
    found += parse_deb822(path.read_text())
  return found


def release(path: pathlib.Path = pathlib.Path("/etc/os-release")) -> dict[str, str]:
  """ID, VERSION_CODENAME and friends; empty where the machine has no such file."""
  if not path.is_file():
    return {}
  pairs = (line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
  return {key: value.strip().strip("\"'") for key, value in pairs}


def backports(found: list[Source], codename: str) -> str:
  """The deb822 text of `<codename>-backports` at the archive this machine uses; empty if it uses none."""
  for source in found:
    if codename in source.suites and "main" in source.components:
      wanted = tuple(c for c in source.components if c in ("main", "universe"))
      return source.with_suite(f"{codename}-backports", wanted)
  return ""


def probe() -> tuple[bool, str]:
  """Renders 16 x 16 pixels in a subprocess, as a driver may crash it: (worked, the device or the reason)."""
  try:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False,
                          timeout=PROBE_SECONDS)
  except subprocess.TimeoutExpired:
    return False, f"the render probe did not answer in {PROBE_SECONDS} s"
  if done.returncode == 0:
    return True, done.stdout.strip().splitlines()[-1]
  said = (done.stderr.strip() or f"it ended with status {done.returncode}").splitlines()
  return False, said[-1]


def apt_get(*arguments: str, may_fail: bool = False) -> None:
  """Runs apt-get without questions; a failure is raised with apt's last lines unless it may fail."""
  environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
  done = subprocess.run(["apt-get", "-q", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, text=True, env=environment, check=False)
  if done.returncode != 0:
    tail = "\n".join(done.stdout.strip().splitlines()[-5:])
    if not may_fail:
      raise RenderingError(f"apt-get {' '.join(arguments)} failed with status {done.returncode}:\n{tail}")
    print(f"rendering: apt-get {arguments[0]} complained (status {done.returncode}), going on:\n{tail}")


def new_enough(version: str) -> bool:
  """Whether a Debian version is at least the Mesa that lavapipe needs."""
  done = subprocess.run(["dpkg", "--compare-versions", version, "ge", NEEDED_MESA], check=False)
  return done.returncode == 0


def apt_cache(*arguments: str) -> str:
  """What apt-cache prints."""
  return subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, check=False).stdout


def suite_with_driver() -> str | None:
  """The suite with a new enough driver, "" when apt takes it by itself, None when no known suite has one."""
  candidate = re.search(r"Candidate: (\S+)", apt_cache("policy", DRIVER))
  if candidate and candidate[1] != "(none)" and new_enough(candidate[1]):
    return ""
  for line in apt_cache("madison", DRIVER).splitlines():  # name | version | URI suite/component arch Packages
    columns = [c.strip() for c in line.split("|")]
    if len(columns) == 3 and columns[2].endswith("Packages") and new_enough(columns[1]):
      return columns[2].split()[1].split("/")[0]
  return None


def advice(codename: str, reason: str) -> str:
  """What a person can do when this script could not."""
  return f"""SAPIEN found no device to render with: {reason}.
It needs a Vulkan device with VK_KHR_external_memory_fd. Do one of these and run this again:
  with an NVIDIA GPU: install its driver with the graphics libraries (in a container:
    NVIDIA_DRIVER_CAPABILITIES=all);
  with another GPU: install its Vulkan driver;
  without a GPU: install lavapipe, that is {DRIVER} >= {NEEDED_MESA}, and {', '.join(LIBRARIES)}.
    As root on Debian >= 12 or Ubuntu >= 24.04 (this machine: {codename or 'unknown'}) `make setup` does that
    by itself; elsewhere build Mesa with -Dvulkan-drivers=swrast and point VK_DRIVER_FILES at its lvp_icd file."""


def install() -> None:
  """Installs lavapipe from the distribution or from its backports, then added to the package sources."""
  codename = release().get("VERSION_CODENAME", "")
  if shutil.which("apt-get") is None:
    raise RenderingError(advice(codename, "there is no apt-get here to install one with"))
  if os.geteuid() != 0:
    raise RenderingError(advice(codename, "only root can install one"))
  print("rendering: no Vulkan device yet; asking apt for Mesa's lavapipe")
  apt_get("update", may_fail=True)  # one unreachable third-party source must not stop us
  suite = suite_with_driver()
  if suite is None and codename and not ADDED.exists():
    text = backports(sources(), codename)
    if text:
      ADDED.write_text(f"# Added by stare_jax (launch/rendering.py) for {DRIVER} >= {NEEDED_MESA}.\n{text}")
      print(f"rendering: added {ADDED}")
      apt_get("update", may_fail=True)
      suite = suite_with_driver()
      if suite is None:
        ADDED.unlink()
  if suite is None:
    raise RenderingError(advice(codename, f"no package source of this machine has {DRIVER} >= {NEEDED_MESA}"))
  target = ("-t", suite) if suite else ()
  apt_get("install", "-y", "--no-install-recommends", *target, DRIVER, *LIBRARIES)


def fingerprint() -> str:
  """Changes whenever another answer of the probe is possible: drivers, loader settings, SAPIEN."""
  settings = ("VK_", "CUDA_VISIBLE_", "NVIDIA_")
  facts = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(settings)]
  for folder in map(pathlib.Path, DRIVER_FOLDERS):
    for path in sorted(folder.glob("*.json")):
      facts.append(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}")
  try:
    facts.append(importlib.metadata.version("sapien"))
  except importlib.metadata.PackageNotFoundError:
    facts.append("no sapien")
  return hashlib.sha256("\n".join([PROBE, *facts]).encode()).hexdigest()


def remembered() -> str:
  """The device found last time, if nothing has changed since; otherwise empty."""
  if not STAMP.is_file():
    return ""
  mark, _, what = STAMP.read_text().partition(" ")
  return what.strip() if mark == fingerprint() else ""


def ensure(check_only: bool) -> str:
  """Returns the device that renders; raises RenderingError when there is none and none could be installed."""
  if remembered():
    return remembered()
  works, what = probe()
  if not works and not check_only:
    install()
    works, what = probe()
  if not works:
    raise RenderingError(advice(release().get("VERSION_CODENAME", ""), what))
  if sys.prefix != sys.base_prefix:  # only a virtual environment is ours to write in
    STAMP.write_text(f"{fingerprint()} {what}\n")
  return what


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--check", action="store_true", help="detect only, install nothing")
  arguments = parser.parse_args()
  try:
    known = bool(remembered())
    what = ensure(arguments.check)
    if not known:
      print(f"rendering: works, {what}")
  except RenderingError as error:
    print(f"rendering: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
