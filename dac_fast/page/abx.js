"use strict";
// A blind test, ABX: which of two sounds is a third one that is chosen at random?

// How often at least so many of n coin tosses are right.
function binomialTail(right, n) {
  let term = 0.5 ** n, sum = 0;
  for (let k = 0; k <= n; k++) {
    if (k >= right) sum += term;
    term *= (n - k) / (k + 1);
  }
  return Math.min(sum, 1);
}

class BlindTest {
  constructor() {
    this.answers = [];
    this.draw();
  }

  draw() { this.x = crypto.getRandomValues(new Uint8Array(1))[0] & 1; }

  answer(which) {
    this.answers.push(which === this.x);
    this.draw();
  }

  get right() { return this.answers.filter(Boolean).length; }

  get pValue() { return binomialTail(this.right, this.answers.length); }
}
