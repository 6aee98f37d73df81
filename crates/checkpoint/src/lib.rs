//! Safetensors and quantised checkpoint formats, validated before a byte is trusted.
