"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from recycle_ds.serving.answers.answering import Answering, Task
from recycle_ds.serving.answers.choices import ChoiceParts
from recycle_ds.serving.answers.formats import ChatFormat, CompletionFormat, Format, Reply
from recycle_ds.serving.answers.prompts import EchoedPrompt
from recycle_ds.serving.answers.sampling import mode_of, params_of
from recycle_ds.serving.conduct.disconnects import ClientGone, unless_disconnected
from recycle_ds.serving.conduct.event_stream import EventStream, SlowReader
from recycle_ds.serving.conduct.log import Record
from recycle_ds.serving.protocol.chats import ChatRequest
from recycle_ds.serving.protocol.completions import CompletionRequest
from recycle_ds.serving.protocol.errors import ApiError, invalid
from recycle_ds.serving.protocol.fields import GenerationFields
from recycle_ds.serving.routes.schemas import body_of
from recycle_ds.serving.service import Model, Service, service_of

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continues prompts."""
    service = service_of(request)
    fields = await service.fields(request, CompletionRequest)
    model = await service.model(request, fields.model)
    prompts = fields.prompts
    if len(prompts) > service.settings.max_prompts:
        most = service.settings.max_prompts
        raise invalid(f"prompt: {len(prompts)} prompts, this server takes at most {most} at once; send fewer", "prompt")
    parses = fields.parse_special is not False
    ids = [one if isinstance(one, list) else await model.encode(one, parse_special=parses) for one in prompts]
    for one in ids:
        if not one:
            raise invalid("prompt: has no token; give at least one", "prompt")
    scores = bool(fields.echo) and fields.logprobs is not None
    if scores and fields.stream:
        raise invalid("stream: not together with echo and logprobs; leave one of them out", "stream")
    mode = mode_of(fields, service.settings, model.capacity)
    # checks lengths, before anything takes long
    task = _task(request, service, model, fields, ids, mode, fields.logprobs, scores)
    parts = ChoiceParts(model.names, details=bool(fields.token_details), logprobs=fields.logprobs)
    echoed = []
    if fields.echo:
        texts = [one if isinstance(one, str) else None for one in prompts]
        pairs = zip(ids, texts, strict=True)
        echoed = [await asyncio.to_thread(EchoedPrompt.of, model.tokenizer, model.names, *pair) for pair in pairs]
    shape = CompletionFormat(parts, fields.n or 1, echoed, drop_answer=fields.max_tokens == 0)
    return await _reply(request, service, model, fields, task, shape)


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answers a chat."""
    service = service_of(request)
    fields = await service.fields(request, ChatRequest)
    model = await service.model(request, fields.model)
    ids = await model.encode_chat(fields)
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    mode = mode_of(fields, service.settings, model.capacity)
    shape = ChatFormat(ChoiceParts(model.names, details=bool(fields.token_details), logprobs=logprobs))
    task = _task(request, service, model, fields, [ids], mode, logprobs, False)
    return await _reply(request, service, model, fields, task, shape)


def _task(
    request: Request,
    service: Service,
    model: Model,
    fields: GenerationFields,
    prompts: list[list[int]],
    mode: str,
    logprobs: int | None,
    scores_prompt: bool,
) -> Task:
    """What is to be decoded. Raises ApiError (400)."""
    details, settings = bool(fields.token_details), service.settings
    if details and logprobs is None and mode != "alternate":
        logprobs = 0  # single tokens are shown with their probability
    priority = fields.priority or 0
    if priority < -settings.max_priority:
        raise invalid(
            f"priority={priority}: lower runs first, this server takes {-settings.max_priority} at least; give no less, or "
            "restart the server with --max-priority",
            "priority",
        )
    params = params_of(
        fields,
        mode=mode,
        logprobs=logprobs,
        prompt_tokens=max(map(len, prompts)),
        settings=settings,
        capacity=model.capacity,
        prompt_logprobs=scores_prompt,
    )
    return Task(
        prompts,
        params,
        mode,
        priority=priority,
        rejected=details,
        by_token=details or logprobs is not None,
        prompt_only=fields.max_tokens == 0,
        seconds=settings.request_seconds,
        retry_after=settings.retry_after,
        shows_causes=service.shows_causes(request),
    )


async def _reply(
    request: Request, service: Service, model: Model, fields: GenerationFields, task: Task, shape: Format
) -> Response:
    """Decodes a task for a client, until it is done or the client is gone."""
    record: Record = request.state.record
    answering = Answering(model.worker, model.tokenizer, task, service.clock)
    answering.usage.started = record.started

    def end(error: BaseException | None) -> None:
        """Frees everything and counts, once, however the request ended."""
        answering.cancel()
        usage = answering.usage
        service.metrics.observe(usage, service.clock())
        figures = usage.figures()
        record.details = {
            "mode": task.mode,
            "stream": bool(fields.stream),
            "answers": task.params.n * len(task.prompts),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "preemptions": usage.preemptions,
            "time_to_first_token": figures["recycle"]["time_to_first_token"],
            "tokens_per_full_call": figures["recycle"]["tokens_per_full_call"],
        }
        if isinstance(error, ClientGone):
            record.ended = "slow_reader" if isinstance(error, SlowReader) else "disconnected"
        elif error is not None:
            record.ended = "disconnected" if isinstance(error, asyncio.CancelledError) else "error"
            record.error = error.code if isinstance(error, ApiError) else type(error).__name__

    reply = Reply(answering, shape, service.settings.model_name)
    if fields.stream:
        return EventStream(
            reply.chunks(fields.wants_usage, fields.wants_running_usage),
            keep_alive_seconds=service.settings.keep_alive_seconds,
            on_end=end,
        )
    try:
        content = await unless_disconnected(request.receive, reply.complete())
    except BaseException as error:
        end(error)
        raise
    end(None)
    return JSONResponse(content)
