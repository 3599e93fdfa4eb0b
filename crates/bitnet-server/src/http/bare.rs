//! What hyper answers by itself, to bytes that never became a request. It has no hook for that and leaves the body empty; on its
//! way to the socket such an answer gets the body and the headers that every error has.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{
    body::Bytes,
    http::{HeaderMap, HeaderValue, StatusCode, header},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    ApiError,
    observe::{REQUEST_ID, RequestId},
};

/// A socket, with answers that are bare filled in.
#[derive(Debug)]
pub(super) struct FillingIn<S> {
    socket: S,
    /// What is left to write of such an answer.
    left: Bytes,
}

impl<S: AsyncWrite + Unpin> FillingIn<S> {
    pub(super) fn new(socket: S) -> Self {
        Self { socket, left: Bytes::new() }
    }

    fn poll_left(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.left.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_write(context, &self.left))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => drop(self.left.split_to(written)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The whole answer, if `head` is one that hyper gave by itself: none of ours refuses anything without a body.
fn filled_in(head: &[u8]) -> Option<Bytes> {
    const EMPTY: &str = "content-length: 0\r\n";
    let refused = [StatusCode::BAD_REQUEST, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE];
    let status = refused.into_iter().find(|status| head.starts_with(format!("HTTP/1.1 {status}\r\n").as_bytes()))?;
    let (before, after) = str::from_utf8(head).ok()?.split_once(EMPTY)?;
    let (error, id) = (ApiError::framework(status), RequestId::new());
    let body = serde_json::to_string(&error.body(&id.0)).ok()?;
    let mut headers = HeaderMap::new();
    error.write_headers(&mut headers);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    headers.insert(REQUEST_ID, HeaderValue::from_str(&id.0).ok()?);
    let lines = headers.iter().filter_map(|(name, value)| Some(format!("{name}: {}\r\n", value.to_str().ok()?)));
    Some(format!("{before}{}{after}{body}", lines.collect::<String>()).into())
}

impl<S: AsyncRead + Unpin> AsyncRead for FillingIn<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FillingIn<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_left(context))?;
        if let Some(whole) = filled_in(bytes) {
            self.left = whole;
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    /// A bare answer has one part; what has more is nothing of hyper's own.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [part] = parts {
            return self.poll_write(context, part);
        }
        ready!(self.poll_left(context))?;
        Pin::new(&mut self.socket).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_left(context))?;
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_left(context))?;
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
