//! `serve`: from flags to a ready server, and to its end.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::time::Instant;

use anyhow::{Context, bail};
use ctxserve_engine::EngineState;
use ctxserve_server::ServerState;

use crate::cli::http::HttpOptions;
use crate::cli::values::Values;
use crate::signals;
use crate::start::{Asked, StartTimes};

/// Serves until a signal or a fault.
///
/// # Errors
/// Whatever keeps it from starting, or ended it.
pub fn serve(values: Values) -> anyhow::Result<()> {
    let start = Instant::now();
    let asked = Asked::read(values)?;
    let listener = bind(&asked.options.http)?;
    let started = asked.open()?.start()?;
    let (state, times) = (started.state()?, started.times);
    drop(started);
    run(listener, state, start, times)
}

/// Takes the port before anything slow happens.
fn bind(http: &HttpOptions) -> anyhow::Result<TcpListener> {
    let place = format!("{}:{}", http.host, http.port);
    let addresses: Vec<SocketAddr> = (http.host.trim_matches(['[', ']']), http.port)
        .to_socket_addrs()
        .with_context(|| format!("--host {}: no such address", http.host))?
        .collect();
    let listener = TcpListener::bind(&addresses[..]).with_context(|| format!("cannot listen on {place}"))?;
    listener.set_nonblocking(true).context("the listening socket")?;
    Ok(listener)
}

fn run(listener: TcpListener, state: ServerState, start: Instant, times: StartTimes) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("async runtime")?;
    let end = runtime.block_on(async {
        let address = listener.local_addr()?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let stop = signals::stop()?;
        let names = state.config().served_model_names.join(", ");
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!("serving {names}; ready on http://{address} in {seconds:.1}s ({times})");
        ctxserve_server::serve(listener, state, stop).await
    });
    runtime.shutdown_background();
    match end? {
        EngineState::Faulted(what) => bail!("the engine failed: {what}"),
        EngineState::Running | EngineState::Draining | EngineState::Stopped => {
            tracing::info!("stopped");
            Ok(())
        }
    }
}
