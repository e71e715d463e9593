"use strict";
// Waveforms and spectrograms, drawn from samples.

const WINDOW = 1024; // samples of a spectrum
const FLOOR_DB = -90; // black

// Discrete Fourier transform in place, by Cooley and Tukey; the length is a power of two.
function fft(real, imaginary) {
  const n = real.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let size = 2; size <= n; size *= 2) {
    const half = size / 2;
    for (let k = 0; k < half; k++) {
      const angle = (-2 * Math.PI * k) / size, c = Math.cos(angle), s = Math.sin(angle);
      for (let i = k; i < n; i += size) {
        const j = i + half;
        const r = real[j] * c - imaginary[j] * s, m = real[j] * s + imaginary[j] * c;
        real[j] = real[i] - r; imaginary[j] = imaginary[i] - m;
        real[i] += r; imaginary[i] += m;
      }
    }
  }
}

// From black over violet and orange to pale yellow.
const PALETTE = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (PALETTE.length - 1);
  const low = Math.min(Math.floor(place), PALETTE.length - 2), rest = place - low;
  return PALETTE[low].map((value, i) => value + rest * (PALETTE[low + 1][i] - value));
}
const COLOURS = Array.from({ length: 256 }, (_, i) => colour(i / 255));

function sized(canvas) {
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * scale));
  return canvas.getContext("2d");
}

// `peak` is what reaches the edges.
function drawWave(canvas, samples, peak) {
  const context = sized(canvas), { width, height } = canvas;
  context.fillStyle = getComputedStyle(canvas).color;
  for (let x = 0; x < width; x++) {
    const begin = Math.floor((x * samples.length) / width);
    const end = Math.max(begin + 1, Math.floor(((x + 1) * samples.length) / width));
    let low = peak, high = -peak;
    for (let i = begin; i < end && i < samples.length; i++) {
      if (samples[i] < low) low = samples[i];
      if (samples[i] > high) high = samples[i];
    }
    const top = ((1 - Math.min(high / peak, 1)) * height) / 2;
    const bottom = ((1 - Math.max(low / peak, -1)) * height) / 2;
    context.fillRect(x, top, 1, Math.max(bottom - top, 1));
  }
}

// The mel scale: as near to the ear's as a picture needs.
const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
const hertz = (mels) => 700 * (10 ** (mels / 2595) - 1);

// Frequencies from 0 at the bottom to half the sample rate at the top.
function drawSpectrum(canvas, samples, rate) {
  const context = sized(canvas), { width, height } = canvas;
  const image = context.createImageData(width, height);
  const real = new Float64Array(WINDOW), imaginary = new Float64Array(WINDOW);
  const hann = Float64Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
  const bins = Int32Array.from({ length: height }, (_, y) => {
    const frequency = hertz((mel(rate / 2) * (height - y - 0.5)) / height);
    return Math.min(Math.round((frequency * WINDOW) / rate), WINDOW / 2);
  });
  for (let x = 0; x < width; x++) {
    const first = Math.round(((x + 0.5) * samples.length) / width - WINDOW / 2);
    for (let i = 0; i < WINDOW; i++) {
      real[i] = (samples[first + i] || 0) * hann[i];
      imaginary[i] = 0;
    }
    fft(real, imaginary);
    for (let y = 0; y < height; y++) {
      const power = (real[bins[y]] ** 2 + imaginary[bins[y]] ** 2) / (WINDOW / 4) ** 2;
      const share = 1 - (10 * Math.log10(power + 1e-12)) / FLOOR_DB;
      const [r, g, b] = COLOURS[Math.round(Math.min(Math.max(share, 0), 1) * 255)];
      image.data.set([r, g, b, 255], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
  const size = (11 * height) / canvas.clientHeight;
  context.font = `${size}px system-ui, sans-serif`;
  context.fillStyle = "#fffc";
  for (const kilohertz of [1, 4, 10].filter((f) => 2000 * f < rate)) {
    const y = height * (1 - mel(1000 * kilohertz) / mel(rate / 2));
    context.fillRect(0, y, size / 2, 1);
    context.fillText(`${kilohertz} kHz`, 0.7 * size, y + size / 3);
  }
}
