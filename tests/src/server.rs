//! A running `bitnet serve`: started on a free port, stopped when dropped.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

/// Longest wait for a small model to be served.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The binary under test: `BITNET_BIN`, or the release build of this workspace.
///
/// # Panics
/// When it has not been built: a test must never silently run without it.
pub fn binary() -> PathBuf {
    let path =
        std::env::var_os("BITNET_BIN").map_or_else(|| workspace_root().join("target/release/bitnet"), PathBuf::from);
    assert!(path.is_file(), "{} is missing: `tests/run` builds it (cargo build --release)", path.display());
    path
}

/// The root of the workspace.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_path_buf()
}

/// A fresh, empty folder named after the test.
///
/// # Panics
/// When the temporary directory cannot be written.
pub fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("bitnet-tests-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).expect("the temporary directory is writable");
    path
}

/// Runs `bitnet` with `args` to its end.
///
/// # Panics
/// When the binary cannot be started.
pub fn bitnet(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().expect("the binary starts")
}

/// A served model. Dropping it kills the process.
#[derive(Debug)]
pub struct Server {
    child: Child,
    base_url: String,
    banner: String,
    client: reqwest::Client,
}

impl Server {
    /// Starts `bitnet serve --port 0 ARGS` and waits for the line that says where it listens.
    ///
    /// # Panics
    /// When the process ends first or says nothing in time; the message holds its stderr.
    pub fn start(args: &[&str]) -> Self {
        Self::start_with_stderr(args, Stdio::piped())
    }

    /// The same with its logs going elsewhere than to the harness.
    ///
    /// # Panics
    /// When the process ends first or says nothing in time.
    pub fn start_with_stderr(args: &[&str], stderr: Stdio) -> Self {
        let mut child = Command::new(binary())
            .args(["serve", "--port", "0"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("the binary starts");
        let stderr = child.stderr.take().map(drain);
        let (banner, base_url) = match wait_for_address(&mut child) {
            Some(found) => found,
            None => {
                let _ = child.kill();
                let _ = child.wait();
                panic!(
                    "no `listening on` line; stderr:\n{}",
                    stderr.and_then(|text| text.recv().ok()).unwrap_or_default()
                );
            }
        };
        Self { child, base_url, banner, client: reqwest::Client::new() }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// What stdout said up to and including the `listening on` line.
    pub fn banner(&self) -> &str {
        &self.banner
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client for requests of an unusual shape.
    pub fn client(&self) -> &reqwest::Client {
        &self.client
    }

    /// GETs `path`.
    ///
    /// # Panics
    /// When the connection fails.
    pub async fn get(&self, path: &str) -> Reply {
        Reply::read(self.client.get(self.url(path)).send().await.expect("the server answers")).await
    }

    /// POSTs a JSON `body` to `path`.
    ///
    /// # Panics
    /// When the connection fails.
    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        Reply::read(self.client.post(self.url(path)).json(body).send().await.expect("the server answers")).await
    }

    /// The value of the first series of `/metrics` that starts with `series`.
    ///
    /// # Panics
    /// When there is none.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let line =
            text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series} in:\n{text}"));
        line.rsplit(' ').next().and_then(|v| v.parse().ok()).expect("a number")
    }

    /// The absolute address of `path`.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base_url)
    }

    /// Waits for the process to end by itself, for at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Headers.
    pub headers: reqwest::header::HeaderMap,
    /// Body.
    pub body: String,
}

impl Reply {
    /// Reads `response` to its end.
    ///
    /// # Panics
    /// When the connection breaks.
    pub async fn read(response: reqwest::Response) -> Self {
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let body = response.text().await.expect("the body is whole");
        Self { status, headers, body }
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The JSON body of a 200.
    ///
    /// # Panics
    /// When the status is another.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// Header `name` as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The payloads of the `data:` lines of an event stream, `[DONE]` included.
    pub fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }

    /// Asserts the error shape of the contract and returns the `error` object.
    ///
    /// # Panics
    /// When the status is another or a key is missing.
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        let body = self.json();
        let error = body.get("error").unwrap_or_else(|| panic!("no `error`: {}", self.body));
        for key in ["message", "type", "param", "code"] {
            assert!(error.get(key).is_some(), "no `{key}`: {}", self.body);
        }
        assert!(error["code"].is_null() || error["code"].is_string(), "{}", self.body);
        assert!(self.header("x-request-id").is_some(), "no x-request-id");
        error.clone()
    }
}

/// Reads stdout up to the `listening on` line, then leaves a thread that keeps the pipe empty.
fn wait_for_address(child: &mut Child) -> Option<(String, String)> {
    let stdout = child.stdout.take().expect("stdout is piped");
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut banner = String::new();
        let mut reader = BufReader::new(stdout);
        let mut line = String::new();
        while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
            banner.push_str(&line);
            if let Some(address) = line.trim().strip_prefix("listening on ") {
                let _ = sender.send((banner.clone(), address.to_owned()));
            }
            line.clear();
        }
    });
    receiver.recv_timeout(START_TIMEOUT).ok()
}

/// Collects `stream` on a thread, so that a full pipe never stops the server.
fn drain(mut stream: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let _ = sender.send(String::from_utf8_lossy(&text).into_owned());
    });
    receiver
}
