//! Answers of the small routes.

use schemars::JsonSchema;
use serde::Serialize;

/// `GET /v1/models`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ModelList<'a> {
    #[schemars(extend("const" = "list"))]
    pub(crate) object: &'static str,
    pub(crate) data: Vec<ModelCard<'a>>,
}

/// One served name.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ModelCard<'a> {
    pub(crate) id: &'a str,
    #[schemars(extend("const" = "model"))]
    pub(crate) object: &'static str,
    /// Unix seconds.
    pub(crate) created: u64,
    pub(crate) owned_by: &'static str,
    /// Where the weights came from.
    pub(crate) root: &'a str,
    pub(crate) parent: Option<&'a str>,
    pub(crate) max_model_len: usize,
}

/// `GET /health`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Health {
    #[schemars(extend("const" = "ok"))]
    pub(crate) status: &'static str,
}

/// `GET /version`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Version {
    pub(crate) version: &'static str,
}

/// `GET /load`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Load {
    /// Sequences running and waiting.
    pub(crate) server_load: usize,
}
