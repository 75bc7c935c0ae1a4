"""An application on Astrocyte that knows nothing of an audit: the variables beside it turn one on.

set -a; . examples/without_code/pipeline.env; set +a
opentelemetry-instrument python examples/without_code/app.py
"""

import asyncio

from astrocyte import Astrocyte


async def main() -> None:
    brain = Astrocyte.from_config_dict(
        {"llm_provider": "mock", "vector_store": "in_memory", "document_store": "in_memory"}
    )
    await brain.retain("Calvin prefers dark mode", "user-calvin")
    found = await brain.recall("What does Calvin like?", "user-calvin")
    print("hits:", len(found.hits))


if __name__ == "__main__":
    asyncio.run(main())
