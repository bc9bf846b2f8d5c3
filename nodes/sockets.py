"""The sockets that only this pack has; pictures, models, latents and prompts travel in the host's own."""

from comfy_api.latest import io

Trajectory = io.Custom("PALIMPSEST_TRAJECTORY")
KV = io.Custom("PALIMPSEST_KV")
Tokens = io.Custom("PALIMPSEST_TOKENS")
AttentionRecord = io.Custom("PALIMPSEST_ATTENTION_RECORD")
BlendWeights = io.Custom("PALIMPSEST_BLEND_WEIGHTS")
ContextAdapter = io.Custom("PALIMPSEST_CONTEXT_ADAPTER")
MultimodalEncoder = io.Custom("PALIMPSEST_MULTIMODAL_ENCODER")
EditHead = io.Custom("PALIMPSEST_EDIT_HEAD")
MultimodalDataset = io.Custom("PALIMPSEST_MULTIMODAL_DATASET")
TextLines = io.Custom("PALIMPSEST_TEXT_LINES")
TextEmbedder = io.Custom("PALIMPSEST_TEXT_EMBEDDER")
