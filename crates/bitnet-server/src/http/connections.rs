//! Our own accept loop, because the framework's has no timer: slow headers are cut off, headers are bounded, and a
//! process out of file descriptors waits instead of spinning.

use std::{
    convert::Infallible,
    error::Error,
    io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Body};
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use super::{bare::FillingIn, guard::Peer};
use crate::{
    metrics::{Metrics, SecurityEvent},
    service::CutOff,
};

/// A request's head has to arrive within this time; an idle connection is closed after it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_HEADERS: usize = 100;
/// Bounds the head of a request, and what is buffered of a body.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Connections at the same time: each costs tens of KiB, so all of them cost some hundred MiB at most.
const MAX_CONNECTIONS: usize = 16_384;
/// How long to wait when the system has no descriptor to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` on `listener` until `closing` turns true, then finishes the requests that are open. A client that takes
/// nothing of what is written for `patience` is cut off: neither its connection nor what waits for it is held for ever.
pub async fn serve_connections(
    listener: TcpListener,
    router: Router,
    metrics: Arc<Metrics>,
    patience: Duration,
    mut closing: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Ended connections leave the set as we go.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = closed(&mut closing) => break,
        };
        let Some((stream, peer, place)) = accepted else { continue };
        let (router, metrics, closing) = (router.clone(), Arc::clone(&metrics), closing.clone());
        connections.spawn(async move {
            let _place = place;
            serve_one(written_within(patience, stream), peer.ip(), router, &metrics, closing).await;
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => Some((stream, peer, place)),
        Err(error) => {
            // A client that was gone before we looked is nobody's trouble.
            if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
                tracing::warn!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            None
        }
    }
}

/// Boxed, because its timer may not be moved.
type PatientStream = Pin<Box<TimeoutStream<TcpStream>>>;

fn written_within(patience: Duration, stream: TcpStream) -> PatientStream {
    // Tokens are small and wanted at once.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience));
    Box::pin(stream)
}

async fn serve_one(
    stream: PatientStream,
    peer: IpAddr,
    router: Router,
    metrics: &Metrics,
    mut closing: watch::Receiver<bool>,
) {
    let _open = OpenConnection::new(metrics);
    let peer = Peer { address: peer, cut_off: CutOff::default() };
    let cut_off = peer.cut_off.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer.clone());
        let answer = router.clone().oneshot(request);
        async move { answer.await.map_err(|never: Infallible| never) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder.max_headers(MAX_HEADERS).max_buf_size(MAX_HEADER_BYTES);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(FillingIn::new(stream)), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closed(&mut closing) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // The connection still holds its answers: they are dropped with it, after they can be told.
    match ended {
        Err(error) if error.is_timeout() => metrics.record_security(SecurityEvent::HeaderTimeout),
        Err(error) if is_write_timeout(&error) => cut_off.set(),
        _ => {}
    }
}

fn is_write_timeout(error: &hyper::Error) -> bool {
    let error = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// Waits until the server closes; its end counts as well.
async fn closed(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

/// Counts the connection while it lives.
struct OpenConnection<'m>(&'m Metrics);

impl<'m> OpenConnection<'m> {
    fn new(metrics: &'m Metrics) -> Self {
        metrics.http_connection_opened();
        Self(metrics)
    }
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        self.0.http_connection_closed();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use axum::{Extension, body::Bytes, routing::get};
    use futures_util::stream;
    use tokio::{sync::mpsc, time::timeout};

    use super::*;
    use crate::metrics::MetricsLimits;

    #[tokio::test]
    async fn whoever_reads_nothing_is_cut_off() {
        let (say_gone, mut gone) = mpsc::channel(1);
        let endless = move |Extension(Peer { cut_off, .. }): Extension<Peer>| {
            let held = Held { cut_off, say_gone: say_gone.clone() };
            async move { Body::from_stream(stream::repeat_with(move || part(&held))) }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Arc::new(Metrics::new("test", MetricsLimits { max_num_seqs: 1, max_queue: 1 }));
        let (close, closing) = watch::channel(false);
        let router = Router::new().route("/", get(endless));
        let server = tokio::spawn(serve_connections(listener, router, metrics, Duration::from_millis(200), closing));
        let client = TcpStream::connect(address).await.unwrap();
        client.writable().await.unwrap();
        client.try_write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        client.readable().await.unwrap();
        // The client still holds its socket.
        let was_cut_off = timeout(Duration::from_secs(60), gone.recv()).await.expect("the answer is dropped");
        assert_eq!(was_cut_off, Some(true));
        close.send(true).unwrap();
        timeout(Duration::from_secs(60), server).await.expect("the connection is closed").unwrap();
        drop(client);
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused_like_everything_else() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Arc::new(Metrics::new("test", MetricsLimits { max_num_seqs: 1, max_queue: 1 }));
        let (_close, closing) = watch::channel(false);
        tokio::spawn(serve_connections(listener, Router::new(), metrics, Duration::from_secs(60), closing));
        let long = format!("GET / HTTP/1.1\r\nHost: x\r\nx: {}\r\n\r\n", "y".repeat(2 * MAX_HEADER_BYTES));
        for (sent, status) in [("GET / HTTP/1.1\r\nbad header\r\n\r\n".to_owned(), "400 "), (long, "431 ")] {
            let answer = tokio::task::spawn_blocking(move || {
                let mut client = std::net::TcpStream::connect(address).unwrap();
                client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                // The server may hang up before it has read everything.
                let _ = client.write_all(sent.as_bytes());
                let mut answer = Vec::new();
                let _ = client.read_to_end(&mut answer);
                String::from_utf8(answer).unwrap()
            });
            let answer = answer.await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.strip_prefix("HTTP/1.1 ").is_some_and(|rest| rest.starts_with(status)), "{head}");
            assert!(
                head.contains(&format!("content-length: {}", body.len())) && head.contains("x-request-id: "),
                "{head}"
            );
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(body["error"]["type"], "invalid_request_error");
        }
    }

    /// What an answer holds: says, when dropped, whether its reader was cut off.
    struct Held {
        cut_off: CutOff,
        say_gone: mpsc::Sender<bool>,
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = self.say_gone.try_send(self.cut_off.is_set());
        }
    }

    fn part(_held: &Held) -> Result<Bytes, Infallible> {
        Ok(Bytes::from_static(&[b'x'; 4096]))
    }
}
