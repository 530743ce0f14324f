"""What the tokens of a job's sequences are given to."""

from __future__ import annotations

from orchestrator.api.choices import CollectedChoice, StreamedChoice
from orchestrator.api.counted import CountedChoice
from orchestrator.api.jobs import Job


def collected_choice(job: Job, index: int) -> CollectedChoice:
    """For `requests[index]`, in an answer that is not streamed."""
    request = job.requests[index]
    return CollectedChoice(job.text_of(request), job.parser(), job.beside_of(request), echoed=job.echoed_to(index))


def streamed_choice(job: Job, index: int) -> StreamedChoice:
    """The same in a stream."""
    request = job.requests[index]
    made = (index, job.shape, job.text_of(request), job.parser(), job.beside_of(request))
    if job.fields.counts_always:
        return CountedChoice(*made, echoed=job.echoed_to(index), num_prompt_tokens=len(request.token_ids))
    return StreamedChoice(*made, echoed=job.echoed_to(index))
