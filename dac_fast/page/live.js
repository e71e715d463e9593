"use strict";
// The microphone, and a live stream through the codec.

// Runs in the audio thread: samples of the microphone out, samples to be heard in.
const WORKLET = `
class Capture extends AudioWorkletProcessor {
  constructor() { super(); this.block = new Float32Array(1024); this.filled = 0; }
  process([[channel]]) {
    if (!channel) return true;
    this.block.set(channel, this.filled);
    this.filled += channel.length;
    if (this.filled === this.block.length) {
      this.port.postMessage(this.block, [this.block.buffer]);
      this.block = new Float32Array(1024);
      this.filled = 0;
    }
    return true;
  }
}
class Playback extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.queue = []; this.waiting = 0; this.played = 0; this.gaps = 0; this.begun = false; this.calls = 0;
    this.ahead = processorOptions.ahead;
    this.port.onmessage = ({ data }) => { this.queue.push(data); this.waiting += data.length; };
  }
  process(_, [[output]]) {
    // What came late is not heard late: all but the newest of it is left out.
    if (this.waiting > 4 * this.ahead) this.take(null, this.waiting - this.ahead);
    if (this.waiting >= (this.begun ? output.length : this.ahead)) {
      this.begun = true;
      this.take(output, output.length);
    } else if (this.begun) {
      this.gaps += 1; this.begun = false;
    }
    if (++this.calls % 32 === 0) this.port.postMessage({ played: this.played, gaps: this.gaps });
    return true;
  }
  take(output, samples) {
    if (!output) this.gaps += 1;
    this.waiting -= samples; this.played += samples;
    for (let at = 0; at < samples; ) {
      const n = Math.min(samples - at, this.queue[0].length);
      if (output) output.set(this.queue[0].subarray(0, n), at);
      this.queue[0] = this.queue[0].subarray(n);
      if (!this.queue[0].length) this.queue.shift();
      at += n;
    }
  }
}
registerProcessor("capture", Capture);
registerProcessor("playback", Playback);
`;

// Calls back with blocks of samples of the microphone at that rate, until it is stopped.
class Microphone {
  async start(rate, onblock) {
    if (!navigator.mediaDevices) throw new Error("The microphone works on https and on localhost only.");
    const processing = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    this.media = await navigator.mediaDevices.getUserMedia({ audio: processing }).catch((error) => {
      throw new Error(error.name === "NotAllowedError" ? "The microphone was not allowed." : "There is no microphone.");
    });
    this.context = new AudioContext({ sampleRate: rate, latencyHint: "interactive" });
    const module = URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" }));
    await this.context.audioWorklet.addModule(module);
    URL.revokeObjectURL(module);
    this.capture = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    this.capture.port.onmessage = ({ data }) => onblock(data);
    this.context.createMediaStreamSource(this.media).connect(this.capture);
    await this.context.resume();
  }

  stop() {
    if (this.media) for (const track of this.media.getTracks()) track.stop();
    if (this.context) this.context.close();
    this.media = this.context = null;
  }
}

// Microphone → encoder → decoder → loudspeaker; codes go from one stream to the other as they come.
class Live {
  constructor(server, model) {
    this.server = server;
    this.model = model;
    this.microphone = new Microphone();
    this.captured = 0;
    this.bytes = 0;
    this.onlevel = this.onnumbers = this.onend = () => {};
  }

  async start() {
    const rate = this.model.sample_rate;
    try {
      const [encoder, decoder] = await Promise.all([this.server.stream("encode"), this.server.stream("decode")]);
      this.sockets = [encoder.socket, decoder.socket];
      for (const socket of this.sockets) {
        socket.onclose = (event) => this.stop(event.reason || "The server ended the stream.");
      }
      await this.microphone.start(rate, (block) => {
        this.captured += block.length;
        this.onlevel(Math.sqrt(block.reduce((sum, x) => sum + x * x, 0) / block.length));
        if (encoder.socket.readyState === WebSocket.OPEN) encoder.socket.send(block);
      });
      const context = this.microphone.context;
      const playback = new AudioWorkletNode(context, "playback", { outputChannelCount: [1], processorOptions: { ahead: 0.04 * rate } });
      playback.connect(context.destination);
      encoder.socket.onmessage = ({ data }) => {
        this.bytes += data.byteLength;
        if (decoder.socket.readyState === WebSocket.OPEN) decoder.socket.send(data);
      };
      decoder.socket.onmessage = ({ data }) => playback.port.postMessage(new Float32Array(data));
      const ahead = (encoder.header.look_ahead + decoder.header.look_ahead) / rate;
      const bits = Math.ceil(Math.log2(this.model.codebook_size));
      playback.port.onmessage = ({ data }) => {
        // Sample n that goes in is sample n that comes out, so what lies between them is the latency.
        const latency = (this.captured - data.played) / rate + (context.outputLatency || 0) + context.baseLatency;
        const kbps = ((this.bytes / 2) * bits) / (this.captured / rate) / 1000;
        if (data.played) this.onnumbers({ latency, ahead, kbps, gaps: data.gaps });
      };
    } catch (error) {
      this.stop();
      throw error;
    }
  }

  stop(why = "") {
    for (const socket of this.sockets || []) {
      socket.onclose = socket.onmessage = null;
      socket.close();
    }
    this.sockets = [];
    this.microphone.stop();
    this.onend(why);
  }
}
