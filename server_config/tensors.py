"""The tensors of the served models: names, types and shapes.

Those of the TensorRT-LLM backend, so that its clients work unchanged; what this server adds is marked.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorField:
    """One tensor of a model configuration: its name, Triton data type and shape without the batch."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)


TEXT_INPUT = TensorField("text_input", "STRING")
INPUT_IDS = TensorField("input_ids", "INT32", (-1,))  # ours: the prompt as tokens, of the preprocessing step
MODEL = TensorField("model", "STRING")  # ours: which tenant
SAMPLING_INPUTS = (
    TensorField("max_tokens", "INT32"),
    TensorField("stream", "BOOL"),
    TensorField("temperature", "FP32"),
    TensorField("top_k", "INT32"),
    TensorField("top_p", "FP32"),
    TensorField("repetition_penalty", "FP32"),
    TensorField("presence_penalty", "FP32"),
    TensorField("frequency_penalty", "FP32"),
    TensorField("random_seed", "UINT64"),  # what it promises: SamplingParams
    TensorField("stop_words", "STRING", (-1,)),
    TensorField("bad_words", "STRING", (-1,)),
    TensorField("min_length", "INT32"),
    TensorField("end_id", "INT32"),
    TensorField("pad_id", "INT32"),
    TensorField("length_penalty", "FP32"),
    TensorField("beam_width", "INT32"),
    TensorField("num_return_sequences", "INT32"),
    TensorField("return_log_probs", "BOOL"),
    TensorField("return_context_logits", "BOOL"),
    TensorField("return_generation_logits", "BOOL"),
    TensorField("exclude_input_in_output", "BOOL"),
    TensorField("guided_decoding_guide_type", "STRING"),  # json, json_schema, regex; ours: lark_grammar
    TensorField("guided_decoding_guide", "STRING"),
    TensorField("sampling_parameters", "STRING"),  # ours: SamplingParams as a JSON object
    # ours: "off", "exact" or "approx" (with which others of the scope can change answers)
    TensorField("kv_reuse", "STRING"),
    TensorField("documents", "STRING", (-1,)),  # ours: texts put before text_input, each tokenized on its own
    # ours: only requests of one model and scope share cached KV; a claim, unless a gateway sets it
    TensorField("kv_scope", "STRING"),
)
HEALTH_INPUT = TensorField("health", "BOOL")  # ours: answered at once, beside the queue
RELOAD_INPUT = TensorField("reload", "BOOL")  # ours: take over what has changed in the zoo
TELL_ERRORS_INPUT = TensorField("tell_errors", "BOOL")  # ours: errors as outputs, with a status
INPUTS = (TEXT_INPUT, INPUT_IDS, MODEL, *SAMPLING_INPUTS, HEALTH_INPUT, TELL_ERRORS_INPUT, RELOAD_INPUT)

TEXT_OUTPUT = TensorField("text_output", "STRING", (-1,))
OUTPUTS = (
    TEXT_OUTPUT,
    TensorField("cum_log_probs", "FP32", (-1,)),
    TensorField("output_log_probs", "FP32", (-1, -1)),
    # ours, where sampling_parameters asks for `logprobs` above 0: the likeliest tokens in each token's place
    TensorField("top_token_ids", "INT32", (-1, -1)),
    TensorField("top_log_probs", "FP32", (-1, -1)),
    # ours, once, where it asks for `prompt_logprobs`: the prompt's tokens; the others for all but the first
    TensorField("prompt_token_ids", "INT32", (-1,)),
    TensorField("prompt_log_probs", "FP32", (-1,)),
    TensorField("prompt_top_token_ids", "INT32", (-1, -1)),
    TensorField("prompt_top_log_probs", "FP32", (-1, -1)),
    # ours, token_ids with every response and the others with the last one
    TensorField("token_ids", "INT32", (-1,)),
    TensorField("finish_reason", "STRING"),
    TensorField("num_prompt_tokens", "INT32"),
    TensorField("num_cached_tokens", "INT32"),
    TensorField("error", "STRING"),
    TensorField("error_status", "STRING"),  # a name of TritonError, for requests with tell_errors
)
REQUEST_ID = TensorField("engine_request_id", "STRING")  # ours: of the engine's step in a tenant's stream
