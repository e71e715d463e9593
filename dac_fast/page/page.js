"use strict";
// The page: what its controls do.

const $ = (id) => document.getElementById(id);
// A page that was written to a file brings its clips along and has no server.
const report = $("report") && JSON.parse($("report").textContent);
const server = report ? null : new Server();
const canvases = Object.fromEntries(["a", "b"].map((side) => [side, {
  wave: document.querySelector(`figure.${side} .wave`),
  spectrum: document.querySelector(`figure.${side} .spectrum`),
}]));

let model = null, limits = null; // as the server describes them
let player = null, test = null, live = null, recording = null;
let clip = null; // { name, versions: [{ codebooks, kbps }], load(version, signal) }
let loading = null; // AbortController of what is being computed

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function status(text) { $("status").textContent = text; }

function fail(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  say(error.message);
}

function audio() {
  const rate = report ? report.model.sample_rate : model.sample_rate;
  player ||= new Player(new AudioContext({ sampleRate: rate, latencyHint: "interactive" }));
  player.onended = showState;
  return player;
}

// ---- a sound -------------------------------------------------------------------------------------------------------

async function open(blob, name) {
  say("");
  status(`Reading ${name} …`);
  try {
    const { context } = audio();
    const bytes = await blob.arrayBuffer();
    let buffer = await context.decodeAudioData(bytes).catch(() => {
      throw new Error(`${name} is no audio file that this browser can read.`);
    });
    const most = Math.floor(limits.clip_seconds * buffer.sampleRate);
    const cut = buffer.length > most;
    if (cut) buffer = firstSamples(buffer, most);
    await openSamples(buffer, name, cut ? `The first ${limits.clip_seconds} s of ${name}.` : `${name}, ${buffer.duration.toFixed(1)} s.`);
  } catch (error) {
    status("");
    fail(error);
  }
}

function firstSamples(buffer, samples) {
  const { context } = audio();
  const shorter = context.createBuffer(buffer.numberOfChannels, samples, buffer.sampleRate);
  for (let i = 0; i < buffer.numberOfChannels; i++) {
    shorter.copyToChannel(buffer.getChannelData(i).subarray(0, samples), i);
  }
  return shorter;
}

async function openSamples(buffer, name, about) {
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  const wav = wavFile(channels, buffer.sampleRate);
  status(about);
  await openClip({
    name,
    original: buffer,
    versions: Array.from({ length: model.n_codebooks }, (_, i) => ({ codebooks: i + 1, kbps: (model.kbps * channels.length * (i + 1)) / model.n_codebooks })),
    load: (version, signal) => server.reconstruct(wav, version.codebooks, signal),
  });
}

async function openClip(chosen) {
  endTest();
  player.stop();
  player.offset = 0;
  clip = chosen;
  clip.cache = new Map();
  clip.peak = clip.original.getChannelData(0).reduce((peak, x) => Math.max(peak, Math.abs(x)), 0.01);
  player.set(0, clip.original);
  player.set(1, null);
  $("listen").hidden = $("abx").hidden = false;
  const slider = $("codebooks");
  slider.min = 0;
  slider.max = clip.versions.length - 1;
  slider.value = Math.min(slider.dataset.chosen ?? slider.max, slider.max);
  showVersion();
  drawSide("a", clip.original);
  drawSide("b", null);
  showState();
  await restore();
}

// ---- its restored version ------------------------------------------------------------------------------------------

const version = () => clip.versions[$("codebooks").value];

function showVersion() {
  const { codebooks, kbps } = version();
  $("codebooks-value").textContent = `${codebooks} · ${kbps.toFixed(2)} kbit/s`;
  $("codebooks").setAttribute("aria-valuetext", `${codebooks} codebooks, ${kbps.toFixed(2)} kilobits per second`);
}

function showNumbers(numbers) {
  const show = (id, value, text) => { $(id).textContent = value == null ? "–" : text(value); };
  show("kbps", numbers?.kbps, (x) => `${x.toFixed(2)} kbit/s`);
  show("ratio", numbers?.ratio, (x) => `${x.toFixed(0)} ×`);
  show("si-sdr", numbers?.si_sdr, (x) => `${x.toFixed(1)} dB`.replace("-", "−"));
  show("mel-distance", numbers?.mel_distance, (x) => x.toFixed(3));
}

async function restore() {
  loading?.abort();
  const mine = (loading = new AbortController()), wanted = version(), of = clip;
  $("busy").hidden = false;
  try {
    if (!of.cache.has(wanted)) {
      const { wav, report: numbers } = await of.load(wanted, mine.signal);
      const buffer = await player.context.decodeAudioData(await wav.arrayBuffer());
      of.cache.set(wanted, { wav, numbers, buffer });
    }
    if (mine.signal.aborted) return;
    const { wav, numbers, buffer } = of.cache.get(wanted);
    player.set(1, buffer);
    showNumbers(numbers);
    drawSide("b", buffer);
    URL.revokeObjectURL($("save").href);
    $("save").href = URL.createObjectURL(wav);
    $("save").hidden = false;
    say("");
    $("busy").hidden = true;
  } catch (error) {
    if (mine.signal.aborted) return;
    $("busy").hidden = true;
    showNumbers(null);
    fail(error);
  }
  showState();
}

function drawSide(side, buffer) {
  const samples = buffer ? buffer.getChannelData(0) : new Float32Array(1);
  drawWave(canvases[side].wave, samples, clip.peak);
  drawSpectrum(canvases[side].spectrum, samples, clip.original.sampleRate);
}

function redraw() {
  if (!clip) return;
  drawSide("a", clip.original);
  drawSide("b", player.buffers[1]);
}

// ---- hearing -------------------------------------------------------------------------------------------------------

function hear(which) {
  player.hear(which);
  showState();
}

function togglePlay() {
  if (!clip) return;
  if (player.running) player.stop();
  else player.play();
  showState();
}

function showState() {
  if (!player) return;
  $("play").textContent = player.running ? "Pause" : "Play";
  $("hear-a").setAttribute("aria-pressed", String(player.heard === 0));
  $("hear-b").setAttribute("aria-pressed", String(player.heard === 1));
  $("hear-b").disabled = !player.buffers[1];
  $("abx-start").disabled = !player.buffers[1];
  document.querySelector("figure.a").classList.toggle("heard", player.heard === 0);
  document.querySelector("figure.b").classList.toggle("heard", player.heard === 1);
}

function tick() {
  if (clip && player.duration) {
    const share = player.position / player.duration;
    $("time").textContent = `${player.position.toFixed(1)} of ${player.duration.toFixed(1)} s`;
    for (const head of document.querySelectorAll(".head")) head.style.left = `calc(${100 * share}% - 1px)`;
  }
  requestAnimationFrame(tick);
}

// ---- the blind test ------------------------------------------------------------------------------------------------

function startTest() {
  test = new BlindTest();
  $("abx-start").hidden = true;
  $("abx-test").hidden = false;
  // What is heard must not show anywhere.
  document.body.classList.add("blind");
  $("codebooks").disabled = true;
  showTest();
  hearInTest("x");
  player.play();
  showState();
}

function hearInTest(name) {
  for (const other of ["a", "b", "x"]) $(`abx-${other}`).setAttribute("aria-pressed", String(other === name));
  player.hear({ a: 0, b: 1, x: test.x }[name]);
}

function answerTest(which) {
  test.answer(which);
  showTest();
  hearInTest("x");
}

function showTest() {
  const n = test.answers.length;
  $("abx-result").textContent = n ? `${test.right} of ${n} right, p = ${test.pValue.toFixed(3)}` : "Which one is X?";
}

function endTest() {
  if (!test) return;
  const n = test.answers.length;
  const verdict = test.pValue < 0.05 ? "You hear a difference." : "That may have been guessing.";
  $("abx-result").textContent = n ? `${test.right} of ${n} right, p = ${test.pValue.toFixed(3)}. ${verdict}` : "";
  test = null;
  $("abx-start").hidden = false;
  $("abx-test").hidden = true;
  document.body.classList.remove("blind");
  $("codebooks").disabled = false;
  showState();
}

// ---- the microphone ------------------------------------------------------------------------------------------------

async function toggleRecording() {
  if (recording) return recording.finish();
  say("");
  const microphone = new Microphone(), blocks = [];
  let samples = 0;
  const finish = () => {
    recording = null;
    microphone.stop();
    $("record").textContent = "Record";
    $("record").setAttribute("aria-pressed", "false");
    if (!samples) return status("Nothing was recorded.");
    const buffer = audio().context.createBuffer(1, samples, model.sample_rate);
    let at = 0;
    for (const block of blocks) {
      buffer.copyToChannel(block, 0, at);
      at += block.length;
    }
    openSamples(buffer, "recording", `A recording of ${buffer.duration.toFixed(1)} s.`).catch(fail);
  };
  recording = { finish };
  try {
    await microphone.start(model.sample_rate, (block) => {
      if (!recording) return;
      blocks.push(block);
      samples += block.length;
      status(`Recording: ${(samples / model.sample_rate).toFixed(1)} s`);
      if (samples + block.length > limits.clip_seconds * model.sample_rate) finish();
    });
    $("record").textContent = "Stop";
    $("record").setAttribute("aria-pressed", "true");
  } catch (error) {
    recording = null;
    microphone.stop();
    fail(error);
  }
}

async function toggleLive() {
  if (live) return live.stop();
  say("");
  live = new Live(server, model);
  $("live-start").textContent = "Stop";
  $("live-start").setAttribute("aria-pressed", "true");
  $("live-status").textContent = "Connecting …";
  live.onlevel = (level) => { $("live-level").value = Math.min(1, 3 * level); };
  live.onnumbers = ({ latency, ahead, kbps, gaps }) => {
    $("live-status").textContent = "You hear yourself through the codec.";
    $("live-numbers").hidden = false;
    $("live-latency").textContent = `${(1000 * latency).toFixed(0)} ms`;
    $("live-ahead").textContent = `${(1000 * ahead).toFixed(0)} ms`;
    $("live-kbps").textContent = `${kbps.toFixed(2)} kbit/s`;
    $("live-gaps").textContent = gaps;
  };
  live.onend = (why) => {
    live = null;
    $("live-start").textContent = "Start";
    $("live-start").setAttribute("aria-pressed", "false");
    $("live-level").value = 0;
    $("live-status").textContent = why;
  };
  await live.start().catch(fail);
}

// ---- what is wired to what -----------------------------------------------------------------------------------------

function connect() {
  const onClick = {
    "choose": () => $("file").click(),
    "record": toggleRecording,
    "example": async () => {
      status("Fetching the example …");
      const answer = await server.ask("example.flac").catch(fail);
      if (answer) await open(await answer.blob(), "example");
    },
    "play": togglePlay,
    "hear-a": () => hear(0),
    "hear-b": () => hear(1),
    "abx-start": startTest,
    "abx-stop": endTest,
    "abx-a": () => hearInTest("a"),
    "abx-b": () => hearInTest("b"),
    "abx-x": () => hearInTest("x"),
    "answer-a": () => answerTest(0),
    "answer-b": () => answerTest(1),
    "live-start": toggleLive,
  };
  for (const [id, action] of Object.entries(onClick)) $(id).addEventListener("click", action);
  $("file").addEventListener("change", () => {
    if ($("file").files.length) open($("file").files[0], $("file").files[0].name);
    $("file").value = "";
  });
  $("loop").addEventListener("change", () => player?.setLoop($("loop").checked));
  $("clip").addEventListener("change", () => openReported($("clip").value));
  let pause = 0;
  $("codebooks").addEventListener("input", () => {
    $("codebooks").dataset.chosen = $("codebooks").value;
    showVersion();
    clearTimeout(pause);
    pause = setTimeout(restore, clip.cache.has(version()) ? 0 : 200);
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      const file = name === "drop" && event.dataTransfer.files[0];
      if (file && server && model) open(file, file.name);
    });
  }
  for (const canvas of document.querySelectorAll("canvas")) {
    canvas.addEventListener("click", (event) => {
      player.seek((event.offsetX / canvas.clientWidth) * player.duration);
    });
  }
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    server.useToken($("token").value);
    $("token-form").hidden = true;
    begin();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

function onKey(event) {
  const typing = event.target.matches("input[type=password], select");
  if (!clip || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const onControl = event.target.matches("button, a, input");
  const keys = test ? {
    "a": () => hearInTest("a"), "b": () => hearInTest("b"), "x": () => hearInTest("x"),
    "1": () => answerTest(0), "2": () => answerTest(1),
  } : {
    "x": () => player.buffers[1] && hear(1 - player.heard),
    "[": () => stepCodebooks(-1), "]": () => stepCodebooks(1),
  };
  if (!onControl) keys[" "] = togglePlay;
  if (!event.target.matches("input[type=range]")) {
    keys.ArrowLeft = () => player.seek(player.position - 1);
    keys.ArrowRight = () => player.seek(player.position + 1);
  }
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function stepCodebooks(by) {
  $("codebooks").value = Number($("codebooks").value) + by;
  $("codebooks").dispatchEvent(new Event("input"));
}

// ---- the beginning -------------------------------------------------------------------------------------------------

function showModel(name) {
  $("model").replaceChildren(new Option(name));
  $("model").disabled = true;
}

async function begin() {
  for (const id of ["choose", "record", "example", "live-start"]) $(id).disabled = true;
  try {
    const described = await server.models();
    [model] = described.models;
    limits = described.limits;
    if (model.parts) throw new Error(`This server has the model's ${model.parts} alone, which makes nothing to hear.`);
    showModel(`${model.name}, up to ${model.kbps.toFixed(1)} kbit/s`);
    say("");
  } catch (error) {
    return fail(error);
  }
  for (const id of ["choose", "record", "example", "live-start"]) $(id).disabled = false;
}

const dataUrl = async (url) => (await fetch(url)).blob();

async function openReported(index) {
  const reported = report.clips[index];
  try {
    const bytes = await (await dataUrl(reported.original)).arrayBuffer();
    await openClip({
      name: reported.name,
      original: await audio().context.decodeAudioData(bytes),
      versions: reported.versions,
      load: async (wanted) => ({ wav: await dataUrl(wanted.audio), report: wanted }),
    });
  } catch (error) {
    fail(error);
  }
}

function beginReport() {
  for (const id of ["input", "live", "reference"]) $(id).hidden = true;
  $("clips").hidden = false;
  showModel(report.model.name);
  report.clips.forEach(({ name }, i) => $("clip").add(new Option(name, i)));
  openReported(0);
}

connect();
requestAnimationFrame(tick);
if (report) beginReport();
else begin();
