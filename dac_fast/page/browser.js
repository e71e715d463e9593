"use strict";
// The page that runs the codec by itself: a file in, piece by piece through the models, and out.

const $ = (id) => document.getElementById(id);
const model = JSON.parse($("model").textContent);
const FRAMES = 8; // of a piece
const sessions = {}; // by part, once they are loaded
let ort = null, last = null; // last: what came out, { channels, rate }

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function status(text) { $("status").textContent = text; }

// A whole signal through "encoder" or "decoder".
async function through(part, signal) {
  const stream = new Stream(ort, sessions[part], model[part], signal.dims[0]);
  const size = signal.dims[2], step = FRAMES * model[part].given_per_frame;
  const pieces = [];
  for (let at = 0; at < size; at += step) {
    const piece = cut(signal, at, Math.min(at + step, size));
    pieces.push(await stream.push(piece));
    if (at + step >= size) pieces.push(await stream.flush(piece));
    status(`${part}: ${Math.round((100 * Math.min(at + step, size)) / size)} %`);
    await new Promise((resolve) => setTimeout(resolve)); // the page stays alive
  }
  return join(pieces);
}

function readFile(bytes, name) {
  try {
    const file = readDac2(bytes);
    const fits = file.modelRate === model.sample_rate && file.hopLength === model.hop_length
      && file.codebookSize === model.codebook_size && file.codes.dims[1] === model.n_codebooks;
    if (!fits) throw new Error(`it was encoded by another model${file.model && `, ${file.model}`}`);
    return file;
  } catch (error) {
    throw new Error(`${name} cannot be decoded here: ${error.message}.`);
  }
}

// Any audio at the model's rate, as a block of whole frames, one item a channel.
async function readAudio(bytes, name) {
  if (!sessions.encoder) throw new Error("This page has no encoder: it takes .dac files.");
  const context = new OfflineAudioContext(1, 1, model.sample_rate);
  const buffer = await context.decodeAudioData(bytes).catch(() => {
    throw new Error(`${name} is no audio file that this browser can read.`);
  });
  const channels = buffer.numberOfChannels, size = Math.ceil(buffer.length / model.hop_length) * model.hop_length;
  const data = new Float32Array(channels * size);
  for (let i = 0; i < channels; i++) data.set(buffer.getChannelData(i), i * size);
  return { audio: { data, dims: [channels, 1, size] }, length: buffer.length };
}

async function open(file) {
  say("");
  $("choose").disabled = true;
  try {
    const bytes = await file.arrayBuffer();
    let begun, read, codes;
    if (file.name.toLowerCase().endsWith(".dac")) {
      read = readFile(bytes, file.name);
      // Files keep the length at the recording's own rate.
      read.length = Math.ceil((read.length * model.sample_rate) / read.sampleRate);
      begun = performance.now();
      codes = read.codes;
    } else {
      read = await readAudio(bytes, file.name);
      begun = performance.now();
      codes = await through("encoder", read.audio);
    }
    const audio = await through("decoder", codes);
    show(audio, codes, read, (performance.now() - begun) / 1000);
    status(file.name);
  } catch (error) {
    status("");
    say(error.message);
  }
  $("choose").disabled = false;
}

function show(audio, codes, { length, gains }, seconds) {
  const [count, , size] = audio.dims, rate = model.sample_rate;
  const channels = Array.from({ length: count }, (_, i) =>
    audio.data.slice(i * size, i * size + length).map((sample) => sample / (gains ? gains[i] : 1)));
  last = { channels, rate, codes };
  const bits = Math.max(1, Math.ceil(Math.log2(model.codebook_size)));
  $("duration").textContent = `${(length / rate).toFixed(2)} s`;
  $("kbps").textContent = `${((codes.data.length * bits) / (length / rate) / 1000).toFixed(2)} kbit/s`;
  $("seconds").textContent = `${seconds.toFixed(2)} s`;
  $("speed").textContent = (length / rate / seconds).toFixed(1);
  URL.revokeObjectURL($("save").href);
  $("save").href = $("sound").src = URL.createObjectURL(wavFile(channels, rate));
  $("result").hidden = false;
  const peak = channels[0].reduce((most, sample) => Math.max(most, Math.abs(sample)), 1e-9);
  drawWave(document.querySelector(".wave"), channels[0], peak);
  drawSpectrum(document.querySelector(".spectrum"), channels[0], rate);
}

async function begin() {
  $("name").textContent = model.name && `Model ${model.name}`;
  $("choose").onclick = () => $("file").click();
  $("file").onchange = () => {
    if ($("file").files.length) open($("file").files[0]);
    $("file").value = "";
  };
  $("drop").ondragover = (event) => event.preventDefault();
  $("drop").ondrop = (event) => {
    event.preventDefault();
    if (!$("choose").disabled && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  };
  try {
    ort = await import("./ort.wasm.min.mjs");
    for (const part of ["encoder", "decoder"]) {
      if (model[part]) sessions[part] = await ort.InferenceSession.create(model[part].file);
    }
    status("Ready.");
    $("choose").disabled = false;
  } catch (error) {
    status("");
    say(`The model cannot be loaded: ${error.message}`);
  }
}

begin();
