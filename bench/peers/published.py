"""Runs the published package, descript-audio-codec, for `bench.peers.Peer`: python published.py JOB.

Needs nothing of this repository. JOB, written with torch.save: `kwargs` and `state` of the model, `direction`
(encode, decode or both), its `input`, `threads`, and the path for `outputs`.
"""

import json
import os
import sys
import time

import torch


def main(path):
    # Whatever the package prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import dac

    job = torch.load(path)
    torch.set_num_threads(job["threads"])
    model = dac.DAC(**job["kwargs"])
    model.load_state_dict(job["state"])
    model.eval()

    def encode(audio):
        z, codes, *_ = model.encode(model.preprocess(audio, model.sample_rate))
        return z, codes

    def decode(codes):
        return (model.decode(model.quantizer.from_codes(codes)[0]),)

    def both(audio):
        codes = encode(audio)[1]
        return codes, *decode(codes)

    run = {"encode": encode, "decode": decode, "both": both}[job["direction"]]

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    answer("ready")
    with torch.no_grad():
        for line in sys.stdin:
            question = json.loads(line)
            if question["do"] == "outputs":
                torch.save(list(run(job["input"])), job["outputs"])
                answer("saved")
            else:
                milliseconds = []
                for _ in range(question["n"]):
                    start = time.perf_counter()
                    run(job["input"])
                    milliseconds.append((time.perf_counter() - start) * 1e3)
                answer(milliseconds)


if __name__ == "__main__":
    main(sys.argv[1])
