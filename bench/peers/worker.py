"""The published package, descript-audio-codec, for `process.py`: python worker.py JOB.

JOB, written with torch.save, holds `kwargs` and `state` of the model, the `direction` (encode,
decode or both), its `input`, the `device`, the number of `threads`, the path for `outputs`, and
`accelerated_by`: folders to import this repository's packages from for `dac_fast.accelerate`. Where
there are none, nothing of this repository is needed.
"""

import json
import os
import sys
import time

import torch
from torch import Tensor


def main(path: str) -> None:
    """Loads the model and answers questions until standard input ends."""
    # Whatever the package prints goes to the log, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import dac

    job = torch.load(path)
    torch.set_num_threads(job["threads"])
    torch.zeros(1, device=job["device"])
    start = time.perf_counter()
    model = dac.DAC(**job["kwargs"])
    model.load_state_dict(job["state"])
    model.eval().to(job["device"])
    if job["accelerated_by"]:
        sys.path[:0] = job["accelerated_by"]
        import dac_fast

        dac_fast.accelerate(model)
    source = job["input"].to(job["device"])
    on_gpu = job["device"] == "cuda"

    def encode(audio: Tensor) -> tuple[Tensor, ...]:
        return (model.encode(model.preprocess(audio, model.sample_rate))[1],)

    def decode(codes: Tensor) -> tuple[Tensor, ...]:
        return (model.decode(model.quantizer.from_codes(codes)[0]),)

    def both(audio: Tensor) -> tuple[Tensor, ...]:
        (codes,) = encode(audio)
        return codes, *decode(codes)

    run = {"encode": encode, "decode": decode, "both": both}[job["direction"]]

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def milliseconds() -> float:
        synchronize()
        start = time.perf_counter()
        run(source)
        synchronize()
        return (time.perf_counter() - start) * 1e3

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    built = time.perf_counter() - start
    answer("ready")
    with torch.no_grad():
        for line in sys.stdin:
            question = json.loads(line)
            if question["do"] == "outputs":
                start = time.perf_counter()
                outputs = [output.cpu() for output in run(source)]
                facts = {"start_s": built + time.perf_counter() - start}
                if on_gpu:
                    facts["peak_bytes"] = torch.cuda.max_memory_allocated()
                torch.save(outputs, job["outputs"])
                answer(facts)
            else:
                answer([milliseconds() for _ in range(question["n"])])


if __name__ == "__main__":
    main(sys.argv[1])
