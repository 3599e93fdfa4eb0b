//! What whoever runs the server relies on: metrics, keys, limits, filter, cancellation, drain, a broken model.

use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bitnet_tests::{
    golden,
    server::{Reply, Server, scratch},
};
use futures_util::StreamExt as _;
use serde_json::{Value, json};

#[tokio::test]
async fn promtool_finds_nothing_in_the_metrics() {
    let server = serve(&[]);
    server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 3})).await.ok();
    server.get("/nowhere").await.error(404);
    let metrics = server.get("/metrics").await;
    assert!(metrics.header("content-type").is_some_and(|t| t.starts_with("text/plain; version=0.0.4")));
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("tests/run installs promtool");
    promtool.stdin.take().expect("piped").write_all(metrics.body.as_bytes()).expect("promtool reads");
    let output = promtool.wait_with_output().expect("promtool ends");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    for name in [
        "bitnet_http_requests_total",
        "bitnet_time_to_first_token_seconds_bucket",
        "bitnet_requests_running",
        "bitnet_build_info",
        "bitnet_generation_tokens_total",
        "bitnet_kv_cache_usage_ratio",
        "process_resident_memory_bytes",
    ] {
        assert!(metrics.body.lines().any(|line| line.starts_with(name)), "no {name}");
    }
}

#[tokio::test]
async fn counters_are_what_the_client_saw() {
    let server = serve(&["--response-cache-mb", "0"]);
    let (mut prompt, mut generated) = (0.0, 0.0);
    for i in 0..10 {
        let answer =
            server.post("/v1/completions", &json!({"prompt": "count me", "max_tokens": i + 1, "seed": i})).await.ok();
        prompt += answer["usage"]["prompt_tokens"].as_f64().expect("a number");
        generated += answer["usage"]["completion_tokens"].as_f64().expect("a number");
    }
    assert_eq!(server.metric("bitnet_prompt_tokens_total").await, prompt);
    assert_eq!(server.metric("bitnet_generation_tokens_total").await, generated);
    assert_eq!(
        server.metric("bitnet_http_requests_total{code=\"200\",method=\"POST\",route=\"/v1/completions\"}").await,
        10.0
    );
}

#[tokio::test]
async fn a_client_that_goes_frees_its_blocks() {
    let server = serve(&[]);
    for stream in [true, false] {
        let body = json!({"prompt": "forever", "max_tokens": 4000, "ignore_eos": true, "stream": stream, "n": 2});
        let request = server.client().post(server.url("/v1/completions")).json(&body).send();
        if stream {
            let mut events = request.await.expect("an answer").bytes_stream();
            events.next().await.expect("a chunk").expect("bytes");
        } else {
            let _ = tokio::time::timeout(Duration::from_millis(150), request).await;
        }
        let end = Instant::now() + Duration::from_secs(5);
        while server.metric("bitnet_requests_running{").await > 0.0
            || server.metric("bitnet_kv_cache_usage_ratio").await > 0.0
        {
            assert!(Instant::now() < end, "the sequence still runs (stream: {stream})");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert!(server.metric("bitnet_stream_cancellations_total{cause=\"client_disconnect\"}").await >= 2.0);
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let server = serve(&["--max-num-seqs", "1", "--max-queue", "1", "--response-cache-mb", "0"]);
    let body = json!({"prompt": "long", "max_tokens": 1500, "ignore_eos": true});
    let replies = futures_util::future::join_all((0..6).map(|_| server.post("/v1/completions", &body))).await;
    let refused: Vec<&Reply> = replies.iter().filter(|r| r.status == 503).collect();
    assert!(!refused.is_empty() && refused.len() < 6);
    for reply in refused {
        assert_eq!(reply.error(503)["code"], json!("server_overloaded"));
        assert!(reply.header("retry-after").and_then(|v| v.parse::<u32>().ok()).is_some_and(|s| (1..=60).contains(&s)));
    }
    assert_eq!(server.get("/health/live").await.status, 200);
}

#[tokio::test]
async fn keys_guard_the_api_and_not_the_probes() {
    let keys = scratch("keys").join("keys");
    fs::write(&keys, "# teams\nalpha:first-secret\n").expect("scratch is writable");
    let server = serve(&["--api-key-file", keys.to_str().expect("UTF-8")]);
    let refused = server.get("/v1/models").await;
    assert_eq!(refused.error(401)["code"], json!("invalid_api_key"));
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    for path in ["/health", "/health/live", "/readyz", "/metrics"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let with = |key: &'static str| {
        let request = server.client().get(server.url("/v1/models")).bearer_auth(key);
        async { request.send().await.expect("an answer").status().as_u16() }
    };
    assert_eq!(with("first-secret").await, 200);
    assert_eq!(with("First-secret").await, 401);
    assert_eq!(with("").await, 401);
}

#[tokio::test]
async fn the_rate_limit_holds_and_says_so() {
    let server = serve(&["--rate-limit-rpm", "4"]);
    let body = json!({"prompt": "a", "max_tokens": 1});
    let mut codes = Vec::new();
    for _ in 0..6 {
        let reply = server.post("/v1/completions", &body).await;
        assert_eq!(reply.header("x-ratelimit-limit-requests"), Some("4"));
        assert!(
            reply.header("x-ratelimit-remaining-requests").is_some()
                && reply.header("x-ratelimit-reset-requests").is_some()
        );
        if reply.status == 429 {
            assert_eq!(reply.error(429)["type"], json!("rate_limit_error"));
            assert!(reply.header("retry-after").is_some() && reply.header("retry-after-ms").is_some());
        }
        codes.push(reply.status);
    }
    assert_eq!(codes, [200, 200, 200, 200, 429, 429]);
}

#[tokio::test]
async fn the_content_filter_holds_on_prompt_and_stream() {
    let folder = scratch("filter");
    let rules = folder.join("rules.toml");
    let open = serve(&[]);
    let body = json!({"prompt": "filter me", "max_tokens": 60, "temperature": 0, "ignore_eos": true});
    let text = open.post("/v1/completions", &body).await.ok()["choices"][0]["text"].as_str().expect("text").to_owned();
    let secret: String = text.chars().skip(12).filter(|c| c.is_ascii_alphanumeric()).take(1).collect();
    let at = text.find(&secret).expect("part of the text");
    let pattern: String = text[at..].chars().take(4).filter(|c| *c != '\u{fffd}').collect();
    fs::write(&rules, format!(
        "[[rule]]\nid = \"in\"\ncategory = \"test\"\nmatch = \"literal\"\npatterns = [\"project aurora\"]\ndirection = \"input\"\naction = \"block\"\nseverity = \"high\"\n\n\
         [[rule]]\nid = \"out\"\ncategory = \"test\"\nmatch = \"literal\"\npatterns = [{}]\ndirection = \"output\"\naction = \"block\"\nseverity = \"high\"\n",
        serde_json::to_string(&pattern).expect("a string"))).expect("scratch is writable");
    let server = serve(&["--content-filter", rules.to_str().expect("UTF-8")]);
    let refused = server.post("/v1/completions", &json!({"prompt": "About PROJECT Aurora", "max_tokens": 1})).await;
    assert_eq!(refused.error(400)["code"], json!("content_filtered"));
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    let answer = server.post("/v1/completions", &body).await.ok();
    assert_eq!(answer["choices"][0]["finish_reason"], json!("content_filter"), "{answer} for {pattern:?} in {text:?}");
    let sent = answer["choices"][0]["text"].as_str().expect("text");
    assert!(text.starts_with(sent) && !sent.contains(&pattern), "{sent:?}");
    assert!(
        server.metric("bitnet_content_filter_matches_total{action=\"block\",direction=\"output\",rule=\"out\"}").await
            >= 1.0
    );
}

#[tokio::test]
async fn a_model_with_a_nan_fails_the_request_and_not_the_process() {
    let folder = scratch("nan");
    for entry in fs::read_dir(golden::path("p1_packed")).expect("the golden model is there") {
        let entry = entry.expect("an entry");
        fs::write(folder.join(entry.file_name()), fs::read(entry.path()).expect("readable"))
            .expect("scratch is writable");
    }
    let file = folder.join("model.safetensors");
    let mut bytes = fs::read(&file).expect("readable");
    let header_len = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().expect("eight"))).expect("small");
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).expect("a header");
    let offset = header["model.norm.weight"]["data_offsets"][0].as_u64().expect("an offset");
    let at = 8 + header_len + usize::try_from(offset).expect("small");
    bytes[at..at + 2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    fs::write(&file, bytes).expect("scratch is writable");
    let server = Server::start(&["-m", folder.to_str().expect("UTF-8")]);
    for _ in 0..3 {
        let reply = server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 3})).await;
        assert_eq!(reply.error(500)["type"], json!("server_error"));
        let streamed = server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 3, "stream": true})).await;
        assert!(!streamed.events().contains(&"[DONE]"), "{}", streamed.body);
        assert!(streamed.body.contains("\"error\""), "{}", streamed.body);
    }
    assert_eq!(server.get("/health/live").await.status, 200);
}

#[tokio::test]
async fn sigterm_lets_open_streams_finish() {
    let mut server = serve(&["--drain-timeout", "30"]);
    let body = json!({"prompt": "drain", "max_tokens": 600, "ignore_eos": true, "stream": true});
    let response = server.client().post(server.url("/v1/completions")).json(&body).send().await.expect("an answer");
    signal(&server, libc::SIGTERM);
    let ready = loop {
        match server.client().get(server.url("/health/ready")).send().await {
            Ok(reply) if reply.status() == 200 => tokio::time::sleep(Duration::from_millis(5)).await,
            other => break other.ok().map(|r| r.status().as_u16()),
        }
    };
    assert!(ready.is_none_or(|code| code == 503), "{ready:?}");
    let reply = Reply::read(response).await;
    assert_eq!(reply.events().last(), Some(&"[DONE]"));
    assert_eq!(server.wait(Duration::from_secs(20)).and_then(|s| s.code()), Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_now() {
    let mut server = serve(&[]);
    let body = json!({"prompt": "drain", "max_tokens": 4000, "ignore_eos": true, "stream": true, "n": 4});
    let _open = server.client().post(server.url("/v1/completions")).json(&body).send().await.expect("an answer");
    signal(&server, libc::SIGTERM);
    tokio::time::sleep(Duration::from_millis(100)).await;
    signal(&server, libc::SIGTERM);
    assert!(server.wait(Duration::from_secs(5)).is_some());
}

#[tokio::test]
async fn health_and_metrics_have_a_port_of_their_own() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let server = serve(&["--metrics-port", &port.to_string()]);
    for path in ["/metrics", "/health/ready"] {
        let reply = server.client().get(format!("http://127.0.0.1:{port}{path}")).send().await.expect("an answer");
        assert_eq!(reply.status(), 200, "{path}");
    }
    let models = server.client().get(format!("http://127.0.0.1:{port}/v1/models")).send().await.expect("an answer");
    assert_eq!(models.status(), 404);
}

#[expect(unsafe_code, reason = "sending a signal is a system call")]
fn signal(server: &Server, signal: i32) {
    let pid = i32::try_from(server.pid()).expect("a process id");
    // SAFETY: `kill` takes plain numbers; the process is our own child and has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

fn serve(args: &[&str]) -> Server {
    Server::start(&[&["-m", &golden::arg("p1_packed")], args].concat())
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off() {
    let server = serve(&["--slow-reader-timeout", "2", "--response-cache-mb", "0"]);
    let body = json!({
        "prompt": "much", "max_tokens": 3500, "ignore_eos": true, "n": 8, "logprobs": 20, "stream": true,
    })
    .to_string();
    let mut client = std::net::TcpStream::connect(server.base_url().trim_start_matches("http://")).expect("it listens");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    client.write_all([head.as_bytes(), body.as_bytes()].concat().as_slice()).expect("the server reads");
    let end = Instant::now() + Duration::from_secs(60);
    while server.metric("bitnet_stream_cancellations_total{cause=\"slow_reader\"}").await < 1.0 {
        assert!(Instant::now() < end, "it is still waited for");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    while server.metric("bitnet_kv_cache_usage_ratio").await > 0.0 {
        assert!(Instant::now() < end, "its sequences still run");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(client);
}
