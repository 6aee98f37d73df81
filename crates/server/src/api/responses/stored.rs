//! Responses that clients come back to: retrieve, delete, cancel, list their input.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::{Path, Query, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde_json::value::RawValue;

use super::live::Live;
use crate::error::ApiError;
use crate::http::body::json;
use crate::http::guard::Caller;
use crate::http::sse;
use crate::state::ServerState;
use crate::store::{Body, Owner, Stored, StoredItem};
use crate::wire::responses_response::{Deleted, ItemList};

/// OpenAI's bounds on a page.
const DEFAULT_PAGE: usize = 20;
const MAX_PAGE: usize = 100;

fn missing(id: &str) -> ApiError {
    let shown: String = id.chars().take(128).collect();
    ApiError::not_found(None, "response_not_found", format!("Response with id '{shown}' not found."))
}

fn found(state: &ServerState, owner: Owner, id: &str) -> Result<Stored<Live>, ApiError> {
    state.responses().get(owner, id).ok_or_else(|| missing(id))
}

fn object(state: &ServerState, owner: Owner, id: &str) -> Result<Response, ApiError> {
    let content_type = [(axum::http::header::CONTENT_TYPE, "application/json")];
    loop {
        let text = match found(state, owner, id)?.body {
            Body::Done(json, _) => json.to_string(),
            Body::Live(live) => match live.snapshot() {
                Some(text) => text,
                // It has ended in this moment: the store has it, or will.
                None => continue,
            },
        };
        return Ok((content_type, text).into_response());
    }
}

/// Gives a response back, or the events of one that runs or ran in the background.
pub(crate) async fn retrieve(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let query = query(&uri)?;
    if !flag(&query, "stream")? {
        return object(&state, caller.tenant, &id);
    }
    let after = number(&query, "starting_after")?;
    let (Body::Live(live) | Body::Done(_, Some(live))) = found(&state, caller.tenant, &id)?.body else {
        let message = "only a response made with background and stream can be streamed again";
        return Err(ApiError::invalid("stream", message));
    };
    if !live.streams() {
        let message = "only a response made with background and stream can be streamed again";
        return Err(ApiError::invalid("stream", message));
    }
    Ok(follow(live, after.map_or(0, |after| after.saturating_add(1)), state.config().keep_alive))
}

/// The events of a background response from number `next` on.
pub(super) fn follow(live: Arc<Live>, next: usize, keep_alive: Duration) -> Response {
    let frames = futures_util::stream::unfold((live, next, VecDeque::new(), false), |state| async move {
        let (live, mut next, mut ready, mut ended) = state;
        loop {
            if let Some(frame) = ready.pop_front() {
                return Some((frame, (live, next, ready, ended)));
            }
            if ended {
                return None;
            }
            match live.events(next).await {
                Some(events) => {
                    next += events.len();
                    ready.extend(events);
                }
                None => {
                    ended = true;
                    ready.push_back(sse::done());
                }
            }
        }
    });
    sse::stream(frames, keep_alive)
}

/// Forgets a response; one that runs is ended.
pub(crate) async fn delete(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let stored = state.responses().remove(caller.tenant, &id).ok_or_else(|| missing(&id))?;
    if let Body::Live(live) = stored.body {
        live.cancel().await;
    }
    json(&Deleted { id: &id, object: "response", deleted: true })
}

/// Ends a response that runs in the background. One that has ended stays as it is.
pub(crate) async fn cancel(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    match found(&state, caller.tenant, &id)?.body {
        Body::Live(live) => live.cancel().await,
        Body::Done(json, _) if is_background(&json) => {}
        Body::Done(..) => {
            let message = "Only a response made with background can be cancelled.";
            return Err(ApiError::invalid("id", message));
        }
    }
    object(&state, caller.tenant, &id)
}

fn is_background(json: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Made {
        background: bool,
    }
    serde_json::from_str::<Made>(json).is_ok_and(|made| made.background)
}

/// Lists what a response's request brought, the newest first unless `order` is `asc`.
pub(crate) async fn input_items(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let query = query(&uri)?;
    let limit = number(&query, "limit")?.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("limit must be 1 to {MAX_PAGE}")));
    }
    let link = found(&state, caller.tenant, &id)?.link;
    let mut items: Vec<&StoredItem> = link.input.iter().collect();
    match query.get("order").map(String::as_str) {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => return Err(ApiError::invalid("order", "order must be 'asc' or 'desc'")),
    }
    let at = |name: &str| -> Result<Option<usize>, ApiError> {
        let Some(id) = query.get(name) else { return Ok(None) };
        let place = items.iter().position(|item| item.id == *id);
        let message = || format!("'{name}' is not the id of an input item of this response");
        place.map(Some).ok_or_else(|| ApiError::invalid(name, message()))
    };
    let begin = at("after")?.map_or(0, |place| place + 1);
    let end = at("before")?.unwrap_or(items.len()).max(begin);
    let rest = items.get(begin..end).unwrap_or_default();
    let page = rest.get(..limit.min(rest.len())).unwrap_or_default();
    let raw = |item: &&StoredItem| serde_json::from_str::<Box<RawValue>>(&item.json);
    let data = page.iter().map(raw).collect::<Result<Vec<_>, _>>();
    let data = data.map_err(|_| ApiError::internal("A stored item could not be read."))?;
    json(&ItemList {
        object: "list",
        data,
        first_id: page.first().map(|item| item.id.as_str()),
        last_id: page.last().map(|item| item.id.as_str()),
        has_more: page.len() < rest.len(),
    })
}

fn query(uri: &Uri) -> Result<HashMap<String, String>, ApiError> {
    let read = Query::<HashMap<String, String>>::try_from_uri(uri);
    read.map(|Query(query)| query)
        .map_err(|error| ApiError::malformed(format!("The query is not valid: {error}")))
}

fn flag(query: &HashMap<String, String>, name: &str) -> Result<bool, ApiError> {
    match query.get(name).map(String::as_str) {
        None | Some("" | "false" | "0") => Ok(false),
        Some("true" | "1") => Ok(true),
        Some(_) => Err(ApiError::invalid(name, format!("{name} must be true or false"))),
    }
}

fn number(query: &HashMap<String, String>, name: &str) -> Result<Option<usize>, ApiError> {
    let invalid = |_| ApiError::invalid(name, format!("{name} must be a number that is not negative"));
    query.get(name).map(|text| text.parse().map_err(invalid)).transpose()
}
