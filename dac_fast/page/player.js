"use strict";
// Two sounds that run side by side, one of which is heard: switching keeps the position, without a gap.

const FADE = 0.008; // seconds

class Player {
  constructor(context) {
    this.context = context;
    this.buffers = [null, null];
    this.heard = 0;
    this.loop = true;
    this.offset = 0; // where a pause left off, in seconds
    this.running = null; // { sources, gains, begun }
    this.onended = () => {};
  }

  get duration() { return this.buffers[0] ? this.buffers[0].duration : 0; }

  get position() {
    if (!this.running) return this.offset;
    const passed = Math.max(this.context.currentTime - this.running.begun, 0) + this.offset;
    return this.loop ? passed % this.duration : Math.min(passed, this.duration);
  }

  // Exchanges a sound; what plays goes on at the same place.
  set(which, buffer) {
    const position = this.position, playing = this.running !== null;
    this.stop();
    this.buffers[which] = buffer;
    this.offset = Math.min(position, this.duration);
    if (playing) this.play();
  }

  play() {
    if (this.running || !this.buffers[0]) return;
    this.context.resume();
    if (this.offset >= this.duration) this.offset = 0;
    const begun = this.context.currentTime + 0.02;
    const gains = this.buffers.map((_, i) => new GainNode(this.context, { gain: i === this.heard ? 1 : 0 }));
    const sources = this.buffers.map((buffer, i) => {
      const source = new AudioBufferSourceNode(this.context, { buffer: buffer || this.buffers[0], loop: this.loop });
      source.connect(gains[i]).connect(this.context.destination);
      source.start(begun, this.offset);
      return source;
    });
    this.running = { sources, gains, begun };
    sources[0].onended = () => {
      if (!this.running || this.running.sources !== sources) return;
      this.running = null;
      this.offset = 0;
      this.onended();
    };
  }

  stop() {
    if (!this.running) return;
    const position = this.position, { sources } = this.running;
    this.running = null;
    for (const source of sources) source.stop();
    this.offset = position;
  }

  seek(seconds) {
    const playing = this.running !== null;
    this.stop();
    this.offset = Math.min(Math.max(seconds, 0), this.duration);
    if (playing) this.play();
  }

  hear(which) {
    this.heard = which;
    if (!this.running) return;
    const now = this.context.currentTime;
    this.running.gains.forEach((gain, i) => {
      gain.gain.cancelScheduledValues(now);
      gain.gain.setValueAtTime(gain.gain.value, now);
      gain.gain.linearRampToValueAtTime(i === which ? 1 : 0, now + FADE);
    });
  }

  setLoop(loop) {
    const playing = this.running !== null;
    this.stop();
    this.loop = loop;
    if (playing) this.play();
  }
}
