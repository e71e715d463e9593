"use strict";
// The server that the page came from.

class ServerError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

class Server {
  constructor() { this.token = sessionStorage.getItem("dac-fast-token") || ""; }

  useToken(token) {
    this.token = token;
    sessionStorage.setItem("dac-fast-token", token);
  }

  async ask(path, options = {}, tries = 4) {
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "The server does not answer.");
    }
    if (answer.ok) return answer;
    const retry = answer.headers.get("Retry-After");
    if (retry && tries > 1) {
      await new Promise((resolve) => setTimeout(resolve, 1000 * retry));
      return this.ask(path, options, tries - 1);
    }
    const said = await answer.json().catch(() => ({}));
    throw new ServerError(answer.status, typeof said.detail === "string" ? said.detail : `Status ${answer.status}.`);
  }

  async models() { return (await this.ask("v1/models")).json(); }

  // A clip through the codec and back: its wav file, and what that cost.
  async reconstruct(wav, codebooks, signal) {
    const answer = await this.ask(`v1/reconstruct?n_quantizers=${codebooks}`, { method: "POST", body: wav, signal });
    return { wav: await answer.blob(), report: JSON.parse(answer.headers.get("X-Dac-Report")) };
  }

  // A stream in one direction, once both sides have said what it is to be.
  stream(direction) {
    const url = new URL(`v1/${direction}/stream`, document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    return new Promise((resolve, reject) => {
      socket.onopen = () => socket.send(JSON.stringify(this.token ? { token: this.token } : {}));
      socket.onmessage = (event) => resolve({ socket, header: JSON.parse(event.data) });
      socket.onclose = (event) => reject(new ServerError(event.code, event.reason || "The server does not answer."));
    });
  }
}
