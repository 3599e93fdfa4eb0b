//! Uploads that are not what they should be: the right error, and nothing on disk.

use std::{fs, path::PathBuf};

use super::*;
use crate::{config::DataSettings, http::ApiError, storage::StorageError};

/// A directory that is gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bitnet-http-files-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    fn serve(&self) -> Fixture {
        let mut setup = Setup::saying("x");
        setup.config.data = Some(DataSettings { dir: self.0.clone(), max_file_bytes: 1000, max_total_bytes: 1500 });
        setup.start()
    }

    fn num_files(&self) -> usize {
        fs::read_dir(self.0.join("files")).unwrap().count()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const PURPOSE: &str = "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n";
const FILE: &str = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"../x\"\r\n\r\n{}\r\n";
const END: &str = "--b--\r\n";

impl Fixture {
    async fn upload(&self, content_type: &str, body: String) -> Reply {
        let request = Request::post("/v1/files").header(header::CONTENT_TYPE, content_type).body(Body::from(body));
        self.send(request.unwrap()).await
    }
}

#[tokio::test]
async fn bad_uploads_leave_nothing() {
    let folder = Folder::new("bad");
    let server = folder.serve();
    let form = "multipart/form-data; boundary=b";
    let large = FILE.replace("{}", &"x".repeat(1001));
    let other = FILE.replace("name=\"file\"", "name=\"expires_after\"");
    let cases = [
        ("application/json", "{}".to_owned(), 415, None),
        ("multipart/form-data", format!("{PURPOSE}{FILE}{END}"), 415, None),
        (form, String::new(), 400, None),
        (form, "nonsense".to_owned(), 400, None),
        (form, format!("{PURPOSE}{}", FILE.trim_end()), 400, None),
        (form, format!("{PURPOSE}{END}"), 400, Some("file")),
        (form, format!("{FILE}{END}"), 400, Some("purpose")),
        (form, format!("{}{FILE}{END}", PURPOSE.replace("batch", "fine-tune")), 400, Some("purpose")),
        (form, format!("{}{FILE}{END}", PURPOSE.replace("batch", &"b".repeat(9999))), 400, Some("purpose")),
        (form, format!("{FILE}{other}{PURPOSE}{END}"), 400, Some("expires_after")),
        (form, format!("{PURPOSE}{large}{END}"), 413, None),
        (form, format!("{PURPOSE}{}{END}", FILE.replace("{}", &"x".repeat(100_000))), 413, None),
    ];
    for (content_type, body, status, param) in cases {
        let start: String = body.chars().take(90).collect();
        let reply = server.upload(content_type, body).await;
        assert_eq!(reply.status.as_u16(), status, "{start}: {}", reply.text());
        assert_eq!(reply.error()["param"].as_str(), param, "{start}");
        assert_eq!(folder.num_files(), 0, "{start}");
    }
    let reply = server.upload(form, format!("{FILE}{PURPOSE}{END}")).await;
    assert_eq!((reply.status, folder.num_files()), (StatusCode::OK, 2), "{}", reply.text());
}

#[tokio::test]
async fn lists_have_pages_with_ranges() {
    let folder = Folder::new("pages");
    let server = folder.serve();
    for (query, param) in [("limit=0", "limit"), ("limit=10001", "limit"), ("order=up", "order"), ("after=x", "after")]
    {
        let reply = server.get(&format!("/v1/files?{query}")).await;
        assert_eq!((reply.status, reply.error()["param"].as_str()), (StatusCode::BAD_REQUEST, Some(param)));
    }
    assert_eq!(server.get("/v1/files?limit=x").await.status, StatusCode::BAD_REQUEST);
    assert_eq!(server.get("/v1/batches?limit=101").await.status, StatusCode::BAD_REQUEST);
    let empty = server.get("/v1/batches").await.json();
    assert_eq!(
        empty,
        serde_json::json!({"object": "list", "data": [], "first_id": null, "last_id": null, "has_more": false})
    );
}

#[test]
fn a_full_disk_says_so_and_asks_for_no_retry() {
    let error = ApiError::from(StorageError::NoSpace);
    let mut headers = HeaderMap::new();
    error.write_headers(&mut headers);
    assert_eq!(headers["x-should-retry"], "false");
    assert!(error.body("req-1").error.message.contains("disk is full"));
    let hidden = ApiError::from(StorageError::Disk("/secret/path: broken".to_owned()));
    assert!(!hidden.body("req-1").error.message.contains("/secret"));
}
