//! Hostile requests against the real binary: each is a 4xx in the one shape, none a 5xx, and a stream beside them keeps its
//! tokens to the bit.

use std::time::{Duration, Instant};

use bitnet_tests::{
    golden,
    server::{Reply, Server},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

#[path = "../../crates/bitnet-server/src/http/tests/hostile_table.rs"]
mod hostile_table;

use hostile_table::{CHAT_BODIES, CHAT_FIELDS, CONTEXT_LENGTH, FIELDS, INVALID, TEXT_BODIES, TEXT_FIELDS, UNSUPPORTED};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A request that must be refused.
struct Attack {
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    body: Vec<u8>,
    status: u16,
    /// Outer `None`: not told in advance.
    param: Option<Option<String>>,
    code: Option<&'static str>,
}

impl Attack {
    fn json(path: &'static str, body: impl Into<Vec<u8>>, param: Option<&str>) -> Self {
        let headers = vec![("content-type", "application/json")];
        Self { path, headers, body: body.into(), status: 400, param: Some(param.map(str::to_owned)), code: None }
    }

    fn field(path: &'static str, fields: &str, param: &str) -> Self {
        Self::json(path, with_fields(path, fields), Some(param))
    }

    async fn run(&self, server: &Server) -> Duration {
        let mut request = server.client().post(server.url(self.path)).body(self.body.clone());
        for (name, value) in &self.headers {
            request = request.header(*name, *value);
        }
        let start = Instant::now();
        let reply = Reply::read(request.send().await.expect("an answer")).await;
        let took = start.elapsed();
        let shown = String::from_utf8_lossy(&self.body[..self.body.len().min(200)]);
        assert_eq!(reply.status, self.status, "{} {shown}: {}", self.path, reply.body);
        assert_shape(&reply, &shown);
        let error = &reply.json()["error"];
        if let Some(param) = &self.param {
            assert_eq!(error["param"], json!(param), "{shown}: {error}");
        }
        if let Some(code) = self.code {
            assert_eq!(error["code"], code, "{shown}: {error}");
        }
        took
    }
}

/// All four keys and no other, the type, an id, and the word that retrying is in vain.
fn assert_shape(reply: &Reply, shown: &str) {
    let error = reply.error(reply.status);
    assert_eq!(error.as_object().map(serde_json::Map::len), Some(4), "{shown}: {error}");
    assert_eq!(error["type"], "invalid_request_error", "{shown}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty() && message.len() < 2000), "{shown}");
    assert_eq!(reply.header("x-should-retry"), Some("false"), "{shown}");
    assert_eq!(reply.header("content-type"), Some("application/json"), "{shown}");
}

fn with_fields(path: &str, fields: &str) -> String {
    match path {
        CHAT => format!(r#"{{"messages":[{{"role":"user","content":"x"}}],{fields}}}"#),
        _ => format!(r#"{{"prompt":"x",{fields}}}"#),
    }
}

/// The rows that the router's tests know too.
fn known() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (path, own) in [(CHAT, CHAT_FIELDS), (TEXT, TEXT_FIELDS)] {
        for (fields, param, code) in FIELDS.iter().chain(own) {
            assert!([INVALID, UNSUPPORTED, CONTEXT_LENGTH].contains(code));
            attacks.push(Attack { code: Some(code), ..Attack::field(path, fields, param) });
        }
    }
    for (path, bodies) in [(CHAT, CHAT_BODIES), (TEXT, TEXT_BODIES)] {
        attacks.extend(bodies.iter().map(|(body, param)| Attack::json(path, *body, *param)));
    }
    attacks
}

/// Fields of one type, and values that are not of it.
const WRONG_TYPES: &[(&str, &str)] = &[
    (
        "temperature top_p min_p frequency_penalty presence_penalty repetition_penalty",
        r#""1" true [] {} 1e400 -1e999 1e308 "NaN" "\u0000""#,
    ),
    (
        "n max_tokens seed top_k min_tokens priority",
        r#""1" true [] {} 1.5 1e400 18446744073709551616 -99999999999999999999999999999999"#,
    ),
    ("stream ignore_eos return_token_ids cache_prompt", r#"1 0 "true" [] {} 1e400"#),
    ("model guided_regex guided_grammar", "1 true [] {} [\"x\"] 1e999"),
    ("stream_options metadata response_format prediction logit_bias structured_outputs", r#"1 "x" true [1] 1e999"#),
    ("stop guided_choice", "1 true {} [1] [null] [[]] [1e999]"),
];

fn wrong_types() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (fields, values) in WRONG_TYPES {
        for field in fields.split(' ') {
            for (number, value) in values.split(' ').enumerate() {
                let path = [CHAT, TEXT][number % 2];
                attacks.push(Attack::field(path, &format!("\"{field}\":{value}"), field));
            }
        }
    }
    for (path, field) in [(TEXT, "logprobs"), (CHAT, "top_logprobs"), (CHAT, "max_completion_tokens")] {
        for value in [r#""1""#, "true", "[]", "{}", "1.5", "-1", "1e400"] {
            attacks.push(Attack::field(
                path,
                &format!("\"logprobs\":true,\"{field}\":{value}")
                    .replace("\"logprobs\":true,\"logprobs\"", "\"logprobs\""),
                field,
            ));
        }
    }
    for value in ["1", "\"x\"", "true", "{}", "[1]", "[[]]", "[null]", "[1e999]", "[\"function\"]"] {
        attacks.push(Attack::field(CHAT, &format!("\"tools\":{value}"), "tools"));
    }
    for value in
        ["NaN", "Infinity", "-Infinity", "+1", "01", ".5", "1.", "0x1F", "'x'", "undefined", "True", "1_000", "-", "1e"]
    {
        attacks.push(Attack::json(TEXT, with_fields(TEXT, &format!("\"temperature\":{value}")), None));
    }
    attacks
}

/// Text that is no text.
fn odd_bytes() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for bytes in [
        &b"{\"prompt\":\"\xff\"}"[..],
        b"{\"prompt\":\"\xc3\"}",
        b"{\"prompt\":\"\xed\xa0\x80\"}",
        b"{\"prompt\":\"\xf8\x88\x80\x80\x80\"}",
        b"{\"prompt\":\"\xc0\xaf\"}",
        b"\xff\xfe{\x00}\x00",
        b"\xfe\xff\x00{\x00}",
        b"\xef\xbb\xbf{\"prompt\":\"x\"}",
        b"{\"prompt\":\"a\nb\"}",
        b"{\"prompt\":\"a\x00b\"}",
        b"{\"prompt\":\"a\x1bb\"}",
        b"\x00",
        b"{\"prompt\":\"x\"}\x00",
        b"{\"prompt\":\"x\"} {}",
        b"{\"prompt\":\"x\"",
        b"{\"prompt\":\"x",
        b"{prompt:\"x\"}",
        b"{\"prompt\":\"x\",}",
        b"{\"prompt\" \"x\"}",
        b"{\"\\ud800\":1,\"prompt\":\"x\"}",
        b"// c\n{\"prompt\":\"x\"}",
        b"--x\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\nx\r\n--x--",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
        b"%7B%22prompt%22%3A%22x%22%7D",
        b"<prompt>x</prompt>",
    ] {
        attacks.push(Attack::json(TEXT, bytes, None));
    }
    for (path, body) in [
        (TEXT, r#"{"prompt":"\ud800"}"#),
        (TEXT, r#"{"prompt":"\udc00\ud800"}"#),
        (TEXT, r#"{"prompt":"\uD83D\u0041"}"#),
        (TEXT, r#"{"prompt":"\x41"}"#),
        (TEXT, r#"{"prompt":"\u00"}"#),
    ] {
        // Whether the whole or the field is named depends on who reads the escape first.
        attacks.push(Attack { param: None, ..Attack::json(path, body, None) });
    }
    attacks
}

/// Bodies out of proportion, and small ones for the other routes.
fn out_of_proportion() -> Vec<Attack> {
    let mut attacks = Vec::new();
    let many = |item: &str, count: usize| vec![item; count].join(",");
    let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let objects = format!("{}1{}", "{\"a\":".repeat(5000), "}".repeat(5000));
    for (path, body, param) in [
        (TEXT, format!("{{\"prompt\":{}}}", nested(100_000)), "prompt"),
        (CHAT, format!("{{\"messages\":{}}}", nested(100_000)), "messages"),
        (CHAT, with_fields(CHAT, &format!("\"tools\":{}", nested(100_000))), "tools"),
        (CHAT, with_fields(CHAT, &format!("\"metadata\":{objects}")), "metadata"),
        (CHAT, with_fields(CHAT, &format!("\"logit_bias\":{objects}")), "logit_bias"),
        (TEXT, with_fields(TEXT, &format!("\"guided_json\":{objects}")), "guided_json"),
        (TEXT, with_fields(TEXT, &format!("\"stop\":[{}]", many("\"a\"", 100_000))), "stop"),
        (TEXT, with_fields(TEXT, &format!("\"guided_choice\":[{}]", many("\"a\"", 100_000))), "guided_choice"),
        (TEXT, with_fields(TEXT, &format!("\"guided_regex\":\"{}\"", "(a*)*".repeat(20_000))), "guided_regex"),
        (TEXT, format!("{{\"prompt\":[{}]}}", many("1", 1_000_000)), "prompt"),
        (TEXT, format!("{{\"prompt\":[{}]}}", many("[1]", 200_000)), "prompt"),
        (TEXT, format!("{{\"prompt\":\"{}\"}}", "x ".repeat(1_000_000)), "prompt"),
        (TEXT, with_fields(TEXT, &format!("\"seed\":{}", "9".repeat(100_000))), "seed"),
        (TEXT, with_fields(TEXT, &format!("\"temperature\":1{}", "0".repeat(100_000))), "temperature"),
        (CHAT, with_fields(CHAT, &format!("\"max_tokens\":{}", "1".repeat(400))), "max_tokens"),
        (CHAT, format!("{{\"messages\":[{}]}}", many("{\"role\":\"user\"}", 50_000)), "messages"),
        (CHAT, format!("{{\"messages\":[{}]}}", many("null", 500_000)), "messages"),
        (CHAT, with_fields(CHAT, "\"messages\":[]"), "messages"),
        (CHAT, with_fields(CHAT, "\"n\":1,\"n\":null"), "n"),
        ("/tokenize", r#"{"prompt":["x"]}"#.to_owned(), "prompt"),
        ("/tokenize", r#"{"messages":[{"role":"user"}]}"#.to_owned(), "messages"),
        ("/detokenize", r#"{"tokens":[-1]}"#.to_owned(), "tokens"),
        ("/detokenize", r#"{"tokens":[4294967296]}"#.to_owned(), "tokens"),
        ("/detokenize", r#"{"tokens":[1e999]}"#.to_owned(), "tokens"),
        ("/apply-template", r#"{"messages":[]}"#.to_owned(), "messages"),
    ] {
        attacks.push(Attack::json(path, body, Some(param)));
    }
    attacks
}

/// Wrong by the head alone.
fn odd_heads() -> Vec<Attack> {
    let body = br#"{"prompt":"x","max_tokens":1}"#.to_vec();
    let head =
        |headers, status| Attack { path: TEXT, headers, body: body.clone(), status, param: Some(None), code: None };
    let mut attacks = vec![head(Vec::new(), 415)];
    for media_type in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "json",
        "*/*",
        ";",
        "application/xml",
    ] {
        attacks.push(head(vec![("content-type", media_type)], 415));
    }
    for encoding in ["gzip", "br", "deflate", "zstd", "identity, gzip", "compress", "x"] {
        attacks.push(head(vec![("content-type", "application/json"), ("content-encoding", encoding)], 415));
    }
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v2/completions",
        "/v1/completions/",
        "/v1/completions/x",
        "/%00",
        "/..%2f..%2fetc/passwd",
        "/v1/%ff",
    ] {
        attacks.push(Attack { path, ..head(vec![("content-type", "application/json")], 404) });
    }
    attacks.push(Attack { path: "/v1/models", ..head(Vec::new(), 405) });
    attacks.push(Attack { path: "/health", ..head(Vec::new(), 405) });
    let large = Attack { body: vec![b' '; (4 << 20) + 1], ..head(vec![("content-type", "application/json")], 413) };
    attacks.push(large);
    attacks
}

#[tokio::test]
async fn hostile_requests_are_4xx_and_harm_nobody() {
    let server = Server::start(&["-m", &golden::arg("p1_packed"), "--response-cache-mb", "0"]);
    let alone = stream(&server).await;
    assert_eq!(alone.len(), NEIGHBOUR_TOKENS);
    let attacks: Vec<Attack> =
        [known(), wrong_types(), odd_bytes(), out_of_proportion(), odd_heads()].into_iter().flatten().collect();
    assert!(attacks.len() >= 300, "only {}", attacks.len());
    let attacking = async {
        let mut times = Vec::with_capacity(attacks.len());
        for attack in &attacks {
            times.push((attack.run(&server).await, attack));
        }
        times
    };
    let beside = async {
        let mut streams = Vec::new();
        for _ in 0..3 {
            streams.push(stream(&server).await);
        }
        streams
    };
    let (mut times, streams) = futures_util::future::join(attacking, beside).await;
    assert!(streams.iter().all(|tokens| *tokens == alone), "a neighbour's tokens changed");
    assert_eq!(server.get("/health").await.status, 200);
    times.sort_by_key(|(took, _)| *took);
    let slow: Vec<String> = times
        .iter()
        .rev()
        .take_while(|(took, _)| took.as_millis() >= 50)
        .map(|(took, attack)| format!("{took:?} for {} bytes to {}", attack.body.len(), attack.path))
        .collect();
    println!(
        "{} hostile requests beside a stream: median {:?}, longest {:?}; 50 ms or more: {slow:?}",
        times.len(),
        times[times.len() / 2].0,
        times.last().map_or(Duration::ZERO, |(took, _)| *took)
    );
}

const NEIGHBOUR_TOKENS: usize = 1500;

/// The token ids of a seeded stream.
async fn stream(server: &Server) -> Vec<Value> {
    let body = json!({"prompt": "steady", "max_tokens": NEIGHBOUR_TOKENS, "seed": 4, "ignore_eos": true, "stream": true,
        "cache_prompt": false, "return_token_ids": true});
    let reply = server.post(TEXT, &body).await;
    assert_eq!(reply.events().last(), Some(&"[DONE]"));
    let chunks = reply.events().into_iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    chunks.filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned()).flatten().collect()
}

/// HTTP that lies: the bytes as they are, and the status of the answer. `0`: the connection just ends.
const LIES: &[(&str, &[u16])] = &[
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        &[400],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
        &[400],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}garbage\r\n0\r\n\r\n",
        &[400],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: gzip\r\n\r\n{}",
        &[400],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: -1\r\n\r\n{}",
        &[400],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        &[400],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        &[400],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999999999\r\n\r\n{}",
        &[413],
    ),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n",
        &[400],
    ),
    ("GET /v1/completions HTTP/9.9\r\n\r\n", &[0, 400]),
    ("\x16\x03\x01\x02\x00\x01\x00", &[0, 400]),
    ("GET /v1/mod\x01els HTTP/1.1\r\nHost: x\r\n\r\n", &[400]),
    ("G\u{e4}T / HTTP/1.1\r\nHost: x\r\n\r\n", &[400]),
    ("GET / HTTP/1.1\r\nbad header\r\n\r\n", &[400]),
];

#[tokio::test]
async fn lies_about_the_message_are_refused_and_harm_nobody() {
    let server = Server::start(&["-m", &golden::arg("p1_packed")]);
    let headers: String = (0..200).map(|i| format!("x-{i}: y\r\n")).collect();
    let long = format!("GET /health HTTP/1.1\r\nHost: x\r\nx-long: {}\r\n\r\n", "y".repeat(40_000));
    let many = format!("GET /health HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    let refused: &[u16] = &[400, 431];
    let own = [(long.as_str(), refused), (many.as_str(), refused)];
    for (bytes, statuses) in LIES.iter().copied().chain(own) {
        let text = tell(&server, bytes).await;
        let status: u16 = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        let shown: String = bytes.chars().take(120).collect();
        assert!(statuses.contains(&status), "{shown:?}: {text}");
        if let Some((_, body)) = text.split_once("\r\n\r\n") {
            let error: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{shown:?}: {error}: {text}"));
            assert_eq!(error["error"].as_object().map(serde_json::Map::len), Some(4), "{shown:?}: {body}");
        }
    }
    assert_eq!(server.post(TEXT, &json!({"prompt": "x", "max_tokens": 1})).await.status, 200);
}

/// Sends `bytes` as they are and reads what comes until the server hangs up, with a generous guard. The sending side stays open:
/// closing it is a client that left, who may get no answer.
async fn tell(server: &Server, bytes: &str) -> String {
    let address = server.base_url().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    // The server may hang up before everything is sent.
    let _ = stream.write_all(bytes.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}
