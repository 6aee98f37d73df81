//! SIGINT and SIGTERM: the first begins the shutdown, the second ends the process at once.

use std::future::Future;
use std::io;

use tokio::sync::oneshot;

/// Exit code of a process that a second signal ended.
const FORCED: i32 = 130;

/// Completes on the first signal.
///
/// # Errors
/// The signals cannot be listened for.
pub(crate) fn stop() -> io::Result<impl Future<Output = ()> + Send> {
    let mut signals = Signals::new()?;
    let (first, stopped) = oneshot::channel();
    tokio::spawn(async move {
        let name = signals.next().await;
        tracing::info!("{name}: shutting down; a second signal stops at once");
        let _ = first.send(());
        let name = signals.next().await;
        tracing::warn!("{name} again: stopping at once");
        std::process::exit(FORCED);
    });
    Ok(async move {
        // The task above never drops its end without sending.
        let _ = stopped.await;
    })
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "listening can fail on other systems")]
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> &'static str {
        let _ = tokio::signal::ctrl_c().await;
        "Ctrl-C"
    }
}
