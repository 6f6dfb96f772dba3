"""The OpenAI endpoint: HTTP in OpenAI's forms, over the decoupled model `blockzoo` by gRPC streams."""
