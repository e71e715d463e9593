"""Runs the published package, descript-audio-codec, for `bench.peers.Peer`: python published.py JOB.

Needs nothing of this repository. JOB, written with torch.save: `kwargs` and `state` of the model, `direction`
(encode, decode or both), its `input`, the `device`, `threads`, and the path for `outputs`.
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
    model.eval().to(job["device"])
    source, on_gpu = job["input"].to(job["device"]), job["device"] == "cuda"

    def encode(audio):
        return (model.encode(model.preprocess(audio, model.sample_rate))[1],)

    def decode(codes):
        return (model.decode(model.quantizer.from_codes(codes)[0]),)

    def both(audio):
        (codes,) = encode(audio)
        return codes, *decode(codes)

    def synchronize():
        if on_gpu:
            torch.cuda.synchronize()

    run = {"encode": encode, "decode": decode, "both": both}[job["direction"]]

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    answer("ready")
    with torch.no_grad():
        for line in sys.stdin:
            question = json.loads(line)
            if question["do"] == "outputs":
                torch.save([output.cpu() for output in run(source)], job["outputs"])
                answer({"peak_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {})
            else:
                milliseconds = []
                for _ in range(question["n"]):
                    synchronize()
                    start = time.perf_counter()
                    run(source)
                    synchronize()
                    milliseconds.append((time.perf_counter() - start) * 1e3)
                answer(milliseconds)


if __name__ == "__main__":
    main(sys.argv[1])
