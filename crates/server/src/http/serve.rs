//! Connections, from the listener to the end of a drain.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use ctxserve_engine::EngineState;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::origin::Loopback;
use crate::router::router;
use crate::state::ServerState;

/// Answers that are complete need only this long to be written.
const FLUSH_TIME: Duration = Duration::from_secs(5);
/// Pause after an accept error (file descriptors run out).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `shutdown` completes and what runs has finished, or the engine fails. While it drains, health is
/// 503 and new requests get 503; what still runs after the drain timeout is aborted. Returns how the engine ended; one
/// that does not end although everything was aborted counts as faulted.
///
/// # Errors
/// The listener's address cannot be read.
pub async fn serve(
    listener: TcpListener,
    state: ServerState,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<EngineState> {
    let address = listener.local_addr()?;
    tracing::info!(%address, "listening");
    let connections = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(state.config().limits.max_connections));
    let app = router(state.clone());
    let app = if address.ip().to_canonical().is_loopback() { app.layer(Extension(Loopback)) } else { app };
    let engine = state.engine().clone();
    let mut shutdown = pin!(shutdown);
    let mut stopped = pin!(engine.stopped());
    let mut deadline = pin!(None::<tokio::time::Sleep>);
    let mut aborted = pin!(None::<tokio::time::Sleep>);
    let mut draining = false;
    let end = loop {
        tokio::select! {
            (place, accepted) = accept(&listener, &places) => match accepted {
                Ok((stream, _)) => spawn(stream, place, app.clone(), &state, &connections),
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            () = &mut shutdown, if !draining => {
                draining = true;
                tracing::info!("draining");
                engine.drain();
                deadline.set(Some(tokio::time::sleep(state.config().drain_timeout)));
            }
            () = elapsed(deadline.as_mut()), if deadline.is_some() => {
                tracing::warn!("drain timeout: aborting what still runs");
                deadline.set(None);
                engine.abort_all();
                aborted.set(Some(tokio::time::sleep(state.config().abort_timeout)));
            }
            () = elapsed(aborted.as_mut()), if aborted.is_some() => {
                break EngineState::Faulted("the device does not answer".to_owned());
            }
            end = &mut stopped => break end,
        }
    };
    drop(listener);
    let _ = tokio::time::timeout(FLUSH_TIME, connections.shutdown()).await;
    Ok(end)
}

/// The next connection, once there is a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (Option<OwnedSemaphorePermit>, io::Result<(TcpStream, SocketAddr)>) {
    // The semaphore is never closed.
    let place = Arc::clone(places).acquire_owned().await.ok();
    (place, listener.accept().await)
}

async fn elapsed(mut sleep: Pin<&mut Option<tokio::time::Sleep>>) {
    if let Some(sleep) = sleep.as_mut().as_pin_mut() {
        sleep.await;
    }
}

fn spawn(
    stream: TcpStream,
    place: Option<OwnedSemaphorePermit>,
    app: Router,
    state: &ServerState,
    connections: &GracefulShutdown,
) {
    // Frames are small and must not wait for one another.
    let _ = stream.set_nodelay(true);
    let mut http = hyper::server::conn::http1::Builder::new();
    let limits = &state.config().limits;
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(limits.max_headers)
        .max_buf_size(limits.max_header_bytes);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let connection = connections.watch(connection);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection ended");
        }
        drop(place);
    });
}
