// Errors as OpenAI's clients expect them: a status, and `{ error: { message, type, param, code } }`.
import { CheckpointError, ShapeError, UnsupportedError } from "@switchyard/core";

export interface ErrorBody {
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: string | null;
  };
}

/** What a client is told. */
export class ApiError extends Error {
  readonly status: number;
  readonly param: string | null;
  readonly code: string | null;

  constructor(status: number, message: string, details: { readonly param?: string; readonly code?: string } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.param = details.param ?? null;
    this.code = details.code ?? null;
  }

  get body(): ErrorBody {
    const { message, param, code } = this;
    const type = this.status < 500 ? "invalid_request_error" : "server_error";
    return { error: { message, type, param, code } };
  }
}

/** A parameter that cannot be taken as it is. */
export const badParameter = (param: string, message: string, code = "invalid_value"): ApiError =>
  new ApiError(400, message, { param, code });

/** What a model, a strategy or a chat template refuses is the request's fault; anything else is ours and stays here. */
export function apiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error;
  const refused = [ShapeError, UnsupportedError, CheckpointError].some((kind) => kind.isInstance(error));
  if (refused && error instanceof Error) return new ApiError(400, error.message, { code: "invalid_request" });
  return new ApiError(500, "The server failed on this request; its terminal says why.", { code: "internal_error" });
}
