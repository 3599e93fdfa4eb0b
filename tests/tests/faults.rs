//! What goes wrong around a server: stopped processes, a hanging engine, broken connections, no descriptors, full disks.
//! Nobody else is harmed, and nothing hangs.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::fd::AsRawFd as _,
    process::Stdio,
    time::{Duration, Instant},
};

use bitnet_tests::{
    golden,
    load::{
        client::{completion, prompt, stream},
        process::Process,
    },
    server::Server,
};

#[tokio::test]
async fn a_process_that_stood_still_goes_on() {
    let server = serve();
    let body = completion(&prompt(1, 20), 1500);
    let running = async { stream(&server, &body).await };
    let stopped = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        signal(&server, libc::SIGSTOP);
        tokio::time::sleep(Duration::from_secs(20)).await;
        signal(&server, libc::SIGCONT);
    };
    let (exchange, ()) = futures_util::future::join(running, stopped).await;
    assert!(exchange.is_done(), "{:?}", exchange.outcome);
    assert_eq!(exchange.completion_tokens, 1500);
    wait_for(&server, "/health/ready", 200, Duration::from_secs(10)).await;
}

#[tokio::test]
async fn an_engine_that_hangs_is_seen_and_forgiven() {
    let server = serve();
    let body = completion(&prompt(2, 20), 3500);
    let running = async { stream(&server, &body).await };
    let hanging = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let engine = Traced::stop(Process(server.pid()).thread("engine"));
        wait_for(&server, "/health/ready", 503, Duration::from_secs(15)).await;
        assert_eq!(server.get("/health/live").await.status, 200, "a restart is the last resort");
        drop(engine);
        wait_for(&server, "/health/ready", 200, Duration::from_secs(10)).await;
    };
    let (exchange, ()) = futures_util::future::join(running, hanging).await;
    assert!(exchange.is_done(), "{:?}", exchange.outcome);
}

#[tokio::test]
async fn a_connection_reset_in_the_middle_harms_nobody_else() {
    let server = serve();
    let body = completion(&prompt(3, 20), 600);
    let alone = stream(&server, &body).await;
    let resets = (0..20).map(|index| {
        let request = completion(&prompt(100 + index, 20), 3000).to_string();
        let address = server.base_url().trim_start_matches("http://").to_owned();
        tokio::task::spawn_blocking(move || reset_in_the_middle(&address, &request))
    });
    let (beside, resets) =
        futures_util::future::join(stream(&server, &body), futures_util::future::join_all(resets)).await;
    resets.into_iter().for_each(|reset| reset.expect("the reset client got its first bytes"));
    assert!(beside.is_done() && beside.completion_tokens == alone.completion_tokens, "{:?}", beside.outcome);
    let end = Instant::now() + Duration::from_secs(5);
    while server.metric("bitnet_kv_cache_usage_ratio").await > 0.0 {
        assert!(Instant::now() < end, "a reset connection's blocks are still in use");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_server_out_of_descriptors_comes_back() {
    let server = serve();
    let process = Process(server.pid());
    limit_descriptors(&server, process.num_descriptors() as u64 + 5);
    let address = server.base_url().trim_start_matches("http://").to_owned();
    let crowd: Vec<_> = (0..40).filter_map(|_| TcpStream::connect(&address).ok()).collect();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(process.num_descriptors() > 0, "the process lives");
    drop(crowd);
    wait_for(&server, "/health/ready", 200, Duration::from_secs(10)).await;
    assert!(stream(&server, &completion(&prompt(5, 20), 10)).await.is_done());
}

#[tokio::test]
async fn logs_that_cannot_be_written_stop_nothing() {
    let full = File::options().write(true).open("/dev/full").expect("Linux has /dev/full");
    let args = ["-m", &golden::arg("p1_packed"), "--log-format", "json"];
    let server = Server::start_with_stderr(&args, Stdio::from(full));
    for index in 0..20 {
        assert!(stream(&server, &completion(&prompt(index, 20), 10)).await.is_done());
    }
    server.get("/nowhere").await.error(404);
}

fn serve() -> Server {
    Server::start(&["-m", &golden::arg("p1_packed"), "--response-cache-mb", "0"])
}

/// Asks until `path` answers `status`.
async fn wait_for(server: &Server, path: &str, status: u16, limit: Duration) {
    let end = Instant::now() + limit;
    loop {
        let reply = server.client().get(server.url(path)).timeout(Duration::from_secs(5)).send().await;
        let seen = reply.map(|reply| reply.status().as_u16());
        if seen.as_ref().is_ok_and(|seen| *seen == status) {
            return;
        }
        assert!(Instant::now() < end, "{path} still says {seen:?}, not {status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Reads the first bytes of an answer and then breaks the connection with a reset instead of an end.
fn reset_in_the_middle(address: &str, body: &str) {
    let mut connection = TcpStream::connect(address).expect("the server accepts");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(body.as_bytes())).expect("it reads");
    let mut first = [0; 512];
    assert!(connection.read(&mut first).expect("it answers") > 0);
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = libc::socklen_t::try_from(size_of::<libc::linger>()).expect("small");
    #[expect(unsafe_code, reason = "the standard library cannot reset a connection")]
    // SAFETY: the descriptor is open, and the option's value is a live `linger` of the size given.
    let set = unsafe {
        libc::setsockopt(connection.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size)
    };
    assert_eq!(set, 0);
}

/// A thread that stands still until this is dropped.
struct Traced(i32);

impl Traced {
    #[expect(unsafe_code, reason = "stopping one thread of a process is a system call")]
    fn stop(thread: i32) -> Self {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: these requests take no memory of ours; the thread belongs to our own child.
        unsafe {
            assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, thread, nothing, nothing), 0, "tracing a child is allowed");
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, thread, nothing, nothing), 0);
            assert_eq!(libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL), thread);
        }
        Self(thread)
    }
}

impl Drop for Traced {
    #[expect(unsafe_code, reason = "letting a thread go on is a system call")]
    fn drop(&mut self) {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the request takes no memory of ours, and the thread is traced by this one.
        assert_eq!(unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, nothing, nothing) }, 0);
    }
}

#[expect(unsafe_code, reason = "sending a signal is a system call")]
fn signal(server: &Server, signal: i32) {
    let pid = i32::try_from(server.pid()).expect("a process id");
    // SAFETY: `kill` takes plain numbers; the process is our own child and has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[expect(unsafe_code, reason = "limits of another process are set by a system call")]
fn limit_descriptors(server: &Server, most: u64) {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    let pid = i32::try_from(server.pid()).expect("a process id");
    // SAFETY: the new limit is a live `rlimit`; no old one is asked for.
    assert_eq!(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) }, 0);
}
