"use strict";
// Reads `.dac` files of the format dac2, which dac_fast/storage/dac2.py describes.

const MAGIC = [0x89, 0x44, 0x41, 0x43, 0x0d, 0x0a, 0x1a, 0x0a];

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (0xedb88320 & -(crc & 1));
  }
  return ~crc >>> 0;
}

// The codes as a block { data, dims: [channels, codebooks, frames] }, and what belongs to them.
function readDac2(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer);
  if (!MAGIC.every((byte, i) => bytes[i] === byte)) throw new Error("it is no .dac file of the format dac2");
  const end = bytes.length - 4;
  if (end < 61 || view.getUint32(end, true) !== crc32(bytes.subarray(0, end))) throw new Error("it is damaged");
  const flags = view.getUint16(10, true);
  if (view.getUint16(8, true) !== 2 || !(flags & 1)) throw new Error("it needs dac-fast decode");
  const channels = view.getUint16(28, true), codebooks = view.getUint16(30, true);
  const frames = Number(view.getBigUint64(32, true)), codebookSize = view.getUint32(12, true);
  let at = 61 + bytes[60];
  const gains = Array.from({ length: channels }, (_, i) => (flags & 2 ? view.getFloat32(at + 4 * i, true) : 1));
  if (flags & 2) at += 4 * channels;
  const bits = Math.max(1, Math.ceil(Math.log2(codebookSize)));
  const codes = new BigInt64Array(channels * codebooks * frames);
  let held = 0, value = 0;
  for (let i = 0; i < codes.length; i++) {
    for (; held < bits; held += 8) value = (value << 8) | bytes[at++];
    held -= bits;
    codes[i] = BigInt(value >>> held);
    value &= (1 << held) - 1;
  }
  return {
    codes: { data: codes, dims: [channels, codebooks, frames] }, gains, codebookSize,
    modelRate: view.getUint32(16, true), hopLength: view.getUint32(20, true),
    sampleRate: view.getUint32(24, true), length: Number(view.getBigUint64(48, true)),
    model: new TextDecoder().decode(bytes.subarray(61, 61 + bytes[60])),
  };
}
