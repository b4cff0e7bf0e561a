"""report.py and the page: metrics that survive a crash, progress lines, videos, and the page in a browser."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
import signal
import subprocess
import sys

import browser
import fake_run
import imageio_ffmpeg
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from stare_jax import evaluate, report, report_charts, report_html

PHASES = report.PHASES


def rows_of(path) -> list[tuple[str, int]]:
  return [(row["phase"], row["step"]) for row in report.read_metrics(path)]


def fill(workdir, phases=PHASES, steps=4, **options):
  with report.MetricsLogger(workdir, tensorboard=False, **options) as logger:
    for phase in phases:
      for step in range(1, steps + 1):
        logger.log(phase, step, {"loss": 1 / step}, env_steps=10 * step)


# --- metrics ---


def test_a_row_holds_what_was_logged(tmp_path):
  with report.MetricsLogger(tmp_path, tensorboard=False) as logger:
    logger.log("imitation", np.int64(3), {"a": np.float32(0.5), "b": np.array([2]), "c": float("nan")}, env_steps=7)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())  # on disk before the logger is closed
  assert {k: v for k, v in row.items() if k != "time"} == {
    "phase": "imitation", "step": 3, "env_steps": 7, "a": 0.5, "b": 2.0, "c": None
  }


def test_logging_refuses_arrays_and_reserved_names(tmp_path):
  with report.MetricsLogger(tmp_path, tensorboard=False) as logger:
    with pytest.raises(ValueError, match=r"'loss'.*shape \(2,\)"):
      logger.log("imitation", 1, {"loss": np.zeros(2)})
    with pytest.raises(ValueError, match="step"):
      logger.log("imitation", 1, {"step": 1.0})
  assert rows_of(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("at", [("imitation", -1), ("imitation", 2), ("preference", 0), ("preference", 4),
                                ("interaction", 3)])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path, at):
  fill(tmp_path)
  whole = rows_of(tmp_path / "metrics.jsonl")
  phase, step = at
  with report.MetricsLogger(tmp_path, resume=at, tensorboard=False) as logger:
    for p, s in whole:
      if (PHASES.index(p), s) > (PHASES.index(phase), step):
        logger.log(p, s, {"loss": 0.0})
  assert rows_of(tmp_path / "metrics.jsonl") == whole


def test_a_phase_that_is_done_again_leaves_the_rows_of_those_that_are_not(tmp_path):
  fill(tmp_path)
  whole = rows_of(tmp_path / "metrics.jsonl")
  with report.MetricsLogger(tmp_path, resume=("imitation", 2), keep=("interaction",), tensorboard=False):
    pass
  kept = [(p, s) for p, s in whole if p == "interaction" or (p == "imitation" and s <= 2)]
  assert rows_of(tmp_path / "metrics.jsonl") == kept and len(kept) > 3


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_half_written_last_line_is_dropped(tmp_path, cut):
  fill(tmp_path, ["imitation"])
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes()[:-cut])
  expected = 4 if cut == 1 else 3  # without its newline alone the row is whole
  assert len(report.read_metrics(path)) == expected
  with report.MetricsLogger(tmp_path, resume=("imitation", 4), tensorboard=False) as logger:
    logger.log("imitation", 5, {"loss": 0.0})
  assert rows_of(path)[-1] == ("imitation", 5) and len(rows_of(path)) == expected + 1


def test_damage_in_the_middle_is_named(tmp_path):
  fill(tmp_path, ["imitation"])
  path = tmp_path / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([lines[0], "{oops", *lines[2:]]) + "\n")
  with pytest.raises(ValueError, match="line 2 of 4 is damaged"):
    report.MetricsLogger(tmp_path, resume=("imitation", 4), tensorboard=False)
  assert len(path.read_text().splitlines()) == 4  # nothing lost


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
  fill(tmp_path)
  with pytest.raises(FileExistsError, match="12 rows"):
    report.MetricsLogger(tmp_path, tensorboard=False)
  with pytest.raises(ValueError, match="imitatoin"):
    report.MetricsLogger(tmp_path, resume=("imitatoin", 1), tensorboard=False)


def test_rows_survive_a_kill(tmp_path):
  code = (
    "import os, signal, sys\n"
    "from stare_jax import report\n"
    "logger = report.MetricsLogger(sys.argv[1], tensorboard=False)\n"
    "for step in range(5): logger.log('imitation', step, {'loss': 1.0})\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
  assert done.returncode == -9 and len(report.read_metrics(tmp_path / "metrics.jsonl")) == 5


def events(folder) -> list:
  """The records of the event files of one folder, in order: length u64, crc u32, data, crc u32."""
  out = []
  for path in sorted(folder.glob("events*")):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      out.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return out


def test_tensorboard_has_one_run_per_phase_and_purges_on_resume(tmp_path):
  with report.MetricsLogger(tmp_path) as logger:
    logger.log("imitation", 1, {"loss": 2.0})
    logger.log("preference", 5, {"loss": 1.0, "gap": float("nan")})
  with report.MetricsLogger(tmp_path, resume=("preference", 5)) as logger:
    logger.log("preference", 6, {"loss": 0.5})
  scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "tensorboard" / "preference")
             for v in e.summary.value]
  assert scalars == [(5, "loss", 1.0), (6, "loss", 0.5)]
  starts = [e.step for e in events(tmp_path / "tensorboard" / "preference") if e.session_log.status == 1]
  assert starts == [6]
  assert len(list((tmp_path / "tensorboard" / "imitation").iterdir())) == 1


def test_a_full_disk_under_tensorboard_is_an_error(tmp_path):
  """Its own writer's thread would end in silence, and the next rows would wait for it for ever."""
  logger = report.MetricsLogger(tmp_path)
  logger.log("imitation", 0, {"loss": 1.0})
  logger._writers["imitation"]._py_recordio_writer._writer = open("/dev/full", "wb")
  with pytest.raises(OSError, match="No space left"):
    for step in range(1, 1000):
      logger.log("imitation", step, {"loss": 1.0})


def test_json_that_was_cut_short_is_named(tmp_path):
  path = report.write_json(tmp_path / "summary.json", {"a": [1, 2]})
  assert report.read_json(path) == {"a": [1, 2]}
  path.write_text(path.read_text()[:9])
  with pytest.raises(ValueError, match=r"summary\.json is no JSON file any more .*restore it"):
    report.read_json(path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = report.write_summary(tmp_path, {"x": np.float32(0.5), "y": float("inf"), "z": (1, np.arange(2))})
  assert json.loads(path.read_text()) == {"x": 0.5, "y": None, "z": [1, [0, 1]]}
  with pytest.raises(TypeError, match="object"):
    report.write_summary(tmp_path, {"x": object()})
  assert json.loads(path.read_text())["x"] == 0.5 and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# --- video ---


@pytest.mark.parametrize(("height", "width", "size"), [
  (64, 64, (256, 256)), (33, 35, (246, 232)), (300, 400, (400, 300))
])
def test_video_is_h264_of_the_right_size_and_pictures(tmp_path, height, width, size):
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 256, (5, 1, 1, 3)).astype(np.uint8)
  frames = np.broadcast_to(blocks, (5, height, width, 3))
  path = report.write_video(tmp_path / "v.mp4", frames, fps=8)
  reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
  meta = next(reader)
  back = np.stack([np.frombuffer(f, np.uint8).reshape(size[1], size[0], 3) for f in reader])
  assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 8
  assert tuple(meta["size"]) == size and len(back) == 5
  assert np.abs(back.astype(int) - blocks.astype(int)).mean() < 6
  assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_video_refuses_floats(tmp_path):
  with pytest.raises(ValueError, match=r"float64\[2, 4, 4, 3\].*uint8"):
    report.write_video(tmp_path / "v.mp4", np.zeros((2, 4, 4, 3)))


def test_ffmpeg_starts_without_a_fork_and_ctrl_c_is_not_its_matter(tmp_path, monkeypatch):
  started = []

  class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
      started.append((options["preexec_fn"], int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16)))

  monkeypatch.setattr(imageio_ffmpeg._io.subprocess, "Popen", Popen)
  before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
  report.write_video(tmp_path / "v.mp4", np.zeros((2, 4, 4, 3), np.uint8))
  assert [(fork, mask >> (signal.SIGINT - 1) & 1) for fork, mask in started] == [(None, 1)]
  assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_samples_must_agree_with_themselves_and_can_be_cleared(tmp_path):
  fake_run.sample(tmp_path, "imitation", 0, True)
  fake_run.sample(tmp_path, "interaction", 0, True)
  report.clear_samples(tmp_path, "imitation")
  assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == ["interaction_0.json", "interaction_0.mp4"]
  with pytest.raises(ValueError, match="T, T, T \\+ 1, K, K"):
    report.write_sample(
      tmp_path, label="x", index=0, frames=np.zeros((3, 4, 4, 3), np.uint8), fps=10, task="t", seed=0, success=True,
      stages=["a"], stage_id=np.zeros(3, int), completed_at=np.array([3]), potential=np.zeros(3),
    )


# --- drawings ---


@pytest.mark.parametrize(("value", "text"), [
  (None, "–"), (float("nan"), "–"), (0, "0"), (0.9312, "0.931"), (52.13, "52.1"), (1.2e-5, "1.2e−5"), (1e-5, "1e−5"),
  (12_800, "12\u202f800"), (-0.5, "−0.5"), (800, "800"), (123.4, "123"),
])
def test_number(value, text):
  assert report_charts.number(value) == text


def test_ticks_cover_the_range():
  for low, high in [(0, 1), (-3.2, 7.7), (1e-6, 3e-6), (5, 5), (0, 0), (13_600, 60_800)]:
    ticks = report_charts.nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8


def test_smoothing_and_thinning_keep_gaps_and_means():
  v = np.array([1.0, np.nan, 3.0, 5.0])
  np.testing.assert_allclose(report_charts.smooth(v, 3), [1.0, np.nan, 4.0, 4.0])
  n = report_charts.MAX_POINTS * 7
  x, (y,) = report_charts.thin(np.arange(n, dtype=float), [np.arange(n) % 7 * 1.0])
  assert len(x) == report_charts.MAX_POINTS and np.allclose(y, 3.0)


def test_a_gap_breaks_the_line_and_a_lonely_point_is_drawn():
  path = report_charts.path(np.arange(4.0), np.array([0, np.nan, 2, 3]))
  assert path == "M0.0 0.0h0M2.0 2.0h0L3.0 3.0"


def test_the_band_has_one_part_per_run_of_a_stage():
  assert report_charts.runs([0, 0, 1, 3, 3]) == [(0, 0, 2), (1, 2, 3), (3, 3, 5)]


def test_the_interval_of_a_difference_is_newcombes():
  before, after = evaluate.rate(48, 80), evaluate.rate(56, 70)  # his example of 56/70 against 48/80
  assert report_html.difference(before, after) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_where_episodes_end_adds_up():
  evaluation = fake_run.evaluation("preference")
  ends = report_html.where_they_end(evaluation)
  assert sum(count for _, count in ends) == evaluation["episodes"]
  assert ends[-1] == ("completed", evaluation["stages"][-1]["marginal"]["count"])


# --- the page ---


class Checker(html.parser.HTMLParser):
  """Balanced tags, no ids twice, and every address of a resource."""

  VOID = {"meta", "link", "path", "br", "img"}

  def __init__(self):
    super().__init__()
    self.stack, self.ids, self.addresses, self.text = [], [], [], []

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.addresses += [attributes[n] for n in ("src", "href", "poster") if attributes.get(n)]
    self.ids += [attributes["id"]] if "id" in attributes else []
    if tag not in self.VOID:
      self.stack.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.stack.pop() == tag

  def handle_data(self, data):
    if not {"style", "script"} & set(self.stack):
      self.text.append(data)


def check(page: str) -> str:
  checker = Checker()
  checker.feed(page)
  assert checker.stack == [] and len(set(checker.ids)) == len(checker.ids)
  assert all(address.startswith(("data:", "#")) for address in checker.addresses)
  assert not re.search(r"nan|NaN|None|undefined|Infinity", " ".join(checker.text))
  return re.sub(r"\s+", " ", " ".join(checker.text))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  return fake_run.make(tmp_path_factory.mktemp("full"))


def test_the_page_is_whole_and_says_what_the_folder_says(full):
  page = report.build_report(full).read_text()
  text = check(page)
  final = fake_run.evaluation("interaction")["success_once"]
  assert f"{100 * final['rate']:.1f}\u2009%" in page and f"{final['count']} of {final['n']}" in text
  for word in ("Place sphere", "place the ball in the bin", "Imitation → Preference → Interaction", "0123456789abcdef",
               "python -m stare_jax.main", "sim.num_envs", "Explained variance", "seeds 10000 to 10127",
               "stopped in Transport"):
    assert word in text or word in page, word
  assert page.count("<video") == 6 and "180 pairs of episodes" in text and "60 with 4, 4 with 7" in text


@pytest.mark.parametrize("phases", [("imitation",), ("interaction",), ("preference", "interaction")])
def test_runs_of_some_phases(tmp_path, phases):
  text = check(report.build_report(fake_run.make(tmp_path, phases, videos=False)).read_text())
  for phase in PHASES:
    assert (f"After {phase}" in text or phase.capitalize() in text) == (phase in phases)


def test_nothing_but_a_folder(tmp_path):
  assert "No evaluation has been written yet" in check(report.build_report(tmp_path).read_text())
  with pytest.raises(FileNotFoundError, match="no run folder"):
    report_html.render(tmp_path / "nowhere")


def test_a_run_in_another_simulator_says_so(tmp_path):
  """Success means something else there: the page must not be taken for one of ManiSkill3."""
  fake_run.make(tmp_path, ("imitation",), videos=False)
  summary = json.loads((tmp_path / "summary.json").read_text())
  for name, shown in (("maniskill", False), ("simpler", True)):
    summary["config"]["sim"]["name"] = name
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert (f"simulator {name}" in check(report.build_report(tmp_path).read_text())) is shown


def test_an_unfinished_run_says_so_and_shows_its_curves(tmp_path):
  fake_run.make(tmp_path, ("imitation", "preference"))
  (tmp_path / "summary.json").unlink()
  (tmp_path / "evaluations" / "preference.json").unlink()
  text = check(report.build_report(tmp_path).read_text())
  assert "preference not evaluated yet" in text and "Margin" in text and "raised this" not in text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
  fake_run.make(tmp_path, ("imitation",))
  (tmp_path / "summary.json").write_text('{"task": ')
  (tmp_path / "evaluations" / "preference.json").write_text('{"label": "preference"}')
  (tmp_path / "videos" / "imitation_1.mp4").unlink()
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"phase": "imitation", "ste')
  text = check(report.build_report(tmp_path).read_text())
  for words in ("summary.json could not be read", "preference.json has no task", "1 line(s) could not be read", "Loss"):
    assert words in text


def test_one_row_one_episode_and_empty_stages(tmp_path):
  with report.MetricsLogger(tmp_path, tensorboard=False) as logger:
    logger.log("interaction", 1, {"success": 0.0, "stage_1": float("nan"), "loss": float("nan"), "kl": 0.0})
  evaluation = fake_run.evaluation("interaction", episodes=1)
  evaluation["stages"] = fake_run.evaluate.stage_rates(np.zeros((1, 4), bool), fake_run.STAGES)
  report.write_evaluation(tmp_path, evaluation)
  assert "not reached" in check(report.build_report(tmp_path).read_text())


def test_text_from_the_run_cannot_break_the_page(tmp_path):
  fake_run.make(tmp_path, ("imitation",), videos=False)
  summary = json.loads((tmp_path / "summary.json").read_text())
  summary |= {"task": "<script>alert(1)</script>", "command": "run '</code>\" & more"}
  report.write_summary(tmp_path, summary)
  page = report.build_report(tmp_path).read_text()
  check(page)
  assert "<script>alert" not in page


def test_a_small_page_leaves_videos_out(full, tmp_path):
  size = len(report_html.render(full).encode())
  small = report.build_report(full, path=tmp_path / "small.html", max_bytes=size - 10_000)
  assert small.stat().st_size <= size - 10_000 and 0 < small.read_text().count("<video") < 6
  check(small.read_text())
  with pytest.raises(ValueError, match="max_bytes=1000"):
    report_html.render(full, max_bytes=1000)


@pytest.mark.browser
def test_the_page_in_a_browser(full):
  if browser.find() is None:
    pytest.skip("no Chromium on this machine; install one (apt-get install chromium) to check the page in it")
  page = report.build_report(full)
  with browser.Browser() as b:
    for width, height in ((390, 844), (1280, 900)):
      for dark in (False, True):
        b.open(page, width, height, dark=dark)
        b.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert b.run("document.documentElement.scrollWidth") == width, "scrolls sideways"
        assert b.run(OVERFLOWING) == []
        assert b.console == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in b.requests)
    seen = b.run(SEEK)
    assert seen["ready"] >= 2 and seen["time"] == pytest.approx(3.65, abs=0.11) and seen["step"] == 36
    assert seen["readout"].startswith("step 36 of 48 · Transport") and seen["cursor"] == pytest.approx(0.75, abs=0.01)


# Elements that stick out of their card to the right, which a page that hides its overflow would not show.
OVERFLOWING = """[...document.querySelectorAll('main *')].filter(e => {
  const card = e.parentElement.closest('.card, .chart, .headline, section');
  return card && !e.closest('svg, .stack, .band') && !e.classList.contains('diamond')
    && e.getBoundingClientRect().right > card.getBoundingClientRect().right + 1;
}).map(e => e.className + ': ' + e.textContent.slice(0, 40))"""

# Click three quarters along the first timeline and wait for the video to get there.
SEEK = """(async () => {
  const card = document.querySelector('[data-episode]'), video = card.querySelector('video');
  const band = card.querySelector('.band'), line = card.querySelector('.timeline');
  card.scrollIntoView({block: 'center', behavior: 'instant'});
  if (video.readyState < 2) await new Promise(done => {
    video.addEventListener('loadeddata', done, {once: true});
    setTimeout(done, 20000);
  });
  const box = band.getBoundingClientRect();
  line.setPointerCapture = () => {};  // a made-up event has no pointer to capture
  const there = new Promise(done => { video.addEventListener('seeked', done, {once: true}); setTimeout(done, 20000); });
  line.dispatchEvent(new PointerEvent('pointerdown', {clientX: box.left + box.width * 0.7501, pointerId: 1}));
  await there;
  const cursor = card.querySelector('.cursor').getBoundingClientRect();
  return {ready: video.readyState, time: video.currentTime, step: +line.getAttribute('aria-valuenow'),
          readout: card.querySelector('.readout').textContent,
          cursor: (cursor.left + cursor.width / 2 - box.left) / box.width};
})()"""
