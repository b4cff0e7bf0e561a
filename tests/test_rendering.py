"""Finding lavapipe: package sources of other machines, read from both of apt's formats."""

from __future__ import annotations

import pytest
from conftest import ROOT, load_script

rendering = load_script(ROOT / "launch" / "rendering.py")

DEB822 = """
Types: deb
# a comment between fields
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""
INLINE_KEY = """Types: deb deb-src
URIs: http://mirror.example/ubuntu
Suites: noble
Components: main universe restricted
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----
"""


def test_deb822():
  first, second = rendering.parse_deb822(DEB822)
  assert first.uris == ("http://mirror.example/debian",) and first.suites == ("bookworm", "bookworm-updates")
  assert first.signed_by == "/usr/share/keyrings/debian-archive-keyring.gpg" and second.signed_by == ""
  assert rendering.backports([second, first], "bookworm") == (
    "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n"
    "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n")


def test_an_inline_key_survives():
  text = rendering.backports(rendering.parse_deb822(INLINE_KEY), "noble")
  assert "Components: main universe\n" in text
  assert rendering.parse_deb822(text)[0].signed_by == rendering.parse_deb822(INLINE_KEY)[0].signed_by
  assert "Signed-By:\n -----BEGIN" in text


@pytest.mark.parametrize("field", ["Types: deb-src", "Types: deb\nEnabled: no"])
def test_disabled_and_source_entries_do_not_count(field):
  assert rendering.parse_deb822(f"{field}\nURIs: http://x.example\nSuites: bookworm\nComponents: main\n") == []


@pytest.mark.parametrize("line, signed_by, trusted", [
  ("deb http://mirror.example/debian bookworm main", "", ""),
  ("  deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main non-free # why", "/k.gpg", ""),
  ("deb [ arch=amd64 trusted=yes ] http://mirror.example/debian bookworm main", "", "yes"),
])
def test_one_line(line, signed_by, trusted):
  source, = rendering.parse_one_line(f"# deb http://no.example bookworm main\n{line}\ndeb-src http://s bookworm main\n")
  assert (source.signed_by, source.trusted, source.components[0]) == (signed_by, trusted, "main")
  text = rendering.backports([source], "bookworm")
  assert "URIs: http://mirror.example/debian\nSuites: bookworm-backports\n" in text


def test_sources_of_a_machine(tmp_path):
  (tmp_path / "sources.list.d").mkdir()
  (tmp_path / "sources.list").write_text("deb http://one.example/debian trixie main\n")
  (tmp_path / "sources.list.d" / "two.sources").write_text(DEB822)
  (tmp_path / "sources.list.d" / "three.list.disabled").write_text("deb http://three.example trixie main\n")
  assert [source.uris[0] for source in rendering.sources(tmp_path)] == [
    "http://one.example/debian", "http://mirror.example/debian", "http://mirror.example/debian-security"]
  assert rendering.backports(rendering.sources(tmp_path), "forky") == ""


def test_release(tmp_path):
  (tmp_path / "os-release").write_text('ID=debian\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian 12"\n')
  assert rendering.release(tmp_path / "os-release")["VERSION_CODENAME"] == "bookworm"
  assert rendering.release(tmp_path / "absent") == {}


def test_without_a_device_the_user_learns_what_to_do(monkeypatch, tmp_path):
  """Not root and nothing renders: one error, before anything is installed, that names the package and the version."""
  monkeypatch.setattr(rendering, "STAMP", tmp_path / "stamp")
  monkeypatch.setattr(rendering, "probe", lambda: (False, "failed to find a rendering device"))
  monkeypatch.setattr(rendering.os, "geteuid", lambda: 1000)
  monkeypatch.setattr(rendering.shutil, "which", lambda name: f"/usr/bin/{name}")
  monkeypatch.setattr(rendering, "apt_get", lambda *a, **k: pytest.fail("called apt-get"))
  with pytest.raises(rendering.RenderingError, match=r"(?s)only root.*mesa-vulkan-drivers >= 24\.3"):
    rendering.ensure(check_only=False)
  with pytest.raises(rendering.RenderingError, match="failed to find a rendering device"):
    rendering.ensure(check_only=True)


def test_a_found_device_is_remembered_until_the_drivers_change(monkeypatch, tmp_path):
  icd = tmp_path / "icd.d"
  icd.mkdir()
  calls = []
  monkeypatch.setattr(rendering, "STAMP", tmp_path / "stamp")
  monkeypatch.setattr(rendering, "DRIVER_FOLDERS", (str(icd),))
  monkeypatch.setattr(rendering.sys, "prefix", "/venv")
  monkeypatch.setattr(rendering, "probe", lambda: (calls.append(1) is None, "device: cpu"))
  assert [rendering.ensure(True), rendering.ensure(True)] == ["device: cpu"] * 2 and len(calls) == 1
  (icd / "lvp_icd.json").write_text("{}")
  rendering.ensure(True)
  assert len(calls) == 2
