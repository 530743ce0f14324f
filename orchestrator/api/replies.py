"""What the tokens of a job's sequences are given to."""

from __future__ import annotations

from orchestrator.api.choices import CollectedChoice, ParsedText
from orchestrator.api.jobs import Job
from orchestrator.api.streamed import Streamed, StreamedChoice, StreamedText


def collected_choice(job: Job, index: int) -> CollectedChoice:
    """For `requests[index]`, in an answer that is not streamed."""
    request = job.requests[index]
    return CollectedChoice(job.text_of(request), job.parser(), job.beside_of(request), echoed=job.echoed_to(index))


def streamed_choice(job: Job, index: int) -> Streamed:
    """The same in a stream."""
    request, text, echoed = job.requests[index], job.text_of(job.requests[index]), job.echoed_to(index)
    parser, beside, counts = job.parser(), job.beside_of(request), job.fields.counts_always
    if parser is None and beside is None and not text.may_stop and not counts:
        return StreamedText(index, job.shape, text, echoed=echoed)
    counted = len(request.token_ids) if counts else None
    return StreamedChoice(index, job.shape, ParsedText(text, parser, echoed), beside, counted=counted)
