"use strict";
// Samples, one array per channel, as a wav file of 16 bit.
function wavFile(channels, rate) {
  const frames = channels[0].length, bytes = 2 * channels.length * frames;
  const view = new DataView(new ArrayBuffer(44 + bytes));
  const text = (at, value) => [...value].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + bytes, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, channels.length, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * channels.length * rate, true);
  view.setUint16(32, 2 * channels.length, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, bytes, true);
  let at = 44;
  for (let i = 0; i < frames; i++) {
    for (const channel of channels) {
      view.setInt16(at, Math.min(Math.max(Math.round(channel[i] * 32768), -32768), 32767), true);
      at += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}
