"use strict";
// A signal through a model that keeps no memory between its steps, see docs/exporting.md.

const ENDLESS = 2n ** 40n; // the length of a signal whose end is not known

// Positions from `begin` to `end` of a block { data, dims: [batch, rows, positions] }.
function cut({ data, dims: [batch, rows, size] }, begin, end = size) {
  const result = new data.constructor(batch * rows * (end - begin));
  for (let row = 0; row < batch * rows; row++) {
    result.set(data.subarray(row * size + begin, row * size + end), row * (end - begin));
  }
  return { data: result, dims: [batch, rows, end - begin] };
}

// Blocks of one signal, in order, as one block.
function join(blocks) {
  const [batch, rows] = blocks[0].dims, size = blocks.reduce((sum, { dims }) => sum + dims[2], 0);
  const data = new blocks[0].data.constructor(batch * rows * size);
  let at = 0;
  for (const block of blocks) {
    const own = block.dims[2];
    for (let row = 0; row < batch * rows; row++) data.set(block.data.subarray(row * own, (row + 1) * own), row * size + at);
    at += own;
  }
  return { data, dims: [batch, rows, size] };
}

class Stream {
  // `about` says what the model's own numbers are: "given" and "result", the names of what goes in and
  // comes out; "given_per_frame" and "result_per_frame", their positions in a frame; "lag", "delay", "state".
  constructor(ort, session, about, batch) {
    Object.assign(this, { ort, session, about, batch, frames: 0, length: ENDLESS, early: about.lag, come: 0 });
    this.state = new ort.Tensor("float32", new Float32Array(batch * about.state), [batch, about.state]);
  }

  // The next whole frames, to the outputs that they determine.
  async push(block) {
    const { ort, about, batch } = this;
    const count = (number) => new ort.Tensor("int64", new BigInt64Array(batch).fill(BigInt(number)), [batch]);
    const kind = block.data instanceof Float32Array ? "float32" : "int64";
    const results = await this.session.run({
      [about.given]: new ort.Tensor(kind, block.data, block.dims),
      first: count(this.frames), length: count(this.length), state: this.state,
    });
    this.state = results.next_state;
    this.frames += block.dims[2] / about.given_per_frame;
    const result = results[about.result];
    const early = Math.min(this.early, result.dims[2]);
    this.early -= early;
    this.come += result.dims[2] - early;
    return cut(result, early);
  }

  // The rest, where `last` is the signal's last block.
  async flush(last) {
    this.length = BigInt(this.frames);
    const [batch, rows] = last.dims, size = this.about.delay * this.about.given_per_frame;
    const due = this.frames * this.about.result_per_frame - this.come;
    const rest = await this.push({ data: new last.data.constructor(batch * rows * size), dims: [batch, rows, size] });
    return cut(rest, 0, due);
  }
}
