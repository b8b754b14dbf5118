"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from recycle_ds.serving.protocol.errors import invalid
from recycle_ds.serving.protocol.tokenizing import DetokenizeRequest, TokenizeRequest
from recycle_ds.serving.routes.schemas import body_of
from recycle_ds.serving.service import service_of

router = APIRouter()


@router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a text or of a rendered chat."""
    service = service_of(request)
    fields = await service.fields(request, TokenizeRequest)
    model = await service.model(request, fields.model)
    if fields.prompt is None:
        ids = await model.encode_chat(fields)
    else:
        ids = await model.encode(fields.prompt, parse_special=fields.parse_special is not False)
    found = {"count": len(ids), "max_model_len": model.capacity.context, "tokens": ids}
    if fields.return_token_strs:
        found["token_strs"] = [model.names.token_of(one) for one in ids]
    return JSONResponse(found)


@router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Text of token ids, special tokens included. Bytes that are no text become U+FFFD."""
    service = service_of(request)
    fields = await service.fields(request, DetokenizeRequest)
    model = await service.model(request, fields.model)
    wrong = next((one for one in fields.tokens if one not in model.tokenizer.token_ids), None)
    if wrong is not None:
        raise invalid(f"tokens: {wrong} is not in the model's vocabulary of {len(model.tokenizer.token_ids)}", "tokens")
    text = await asyncio.to_thread(model.tokenizer.decode, fields.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})
