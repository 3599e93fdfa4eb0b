//! The directory by example: what is whole stays, what is not goes, and nobody sees another's.

use std::{fs, io::Read, path::PathBuf};

use super::*;
use crate::openai::BatchEndpoint;

/// A directory that is gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bitnet-storage-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    fn open(&self) -> Arc<Storage> {
        Arc::new(Storage::open(&self.0, StorageLimits { max_file_bytes: 100, max_total_bytes: 250 }).unwrap())
    }

    fn data_files(&self) -> usize {
        fs::read_dir(self.0.join(disk::FILES)).unwrap().count()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn client(number: u8) -> ClientId {
    ClientId::from_address([10, 0, 0, number].into())
}

fn stored(storage: &Arc<Storage>, bytes: &[u8]) -> Result<FileObject, StorageError> {
    let mut upload = storage.upload()?;
    upload.write(bytes)?;
    upload.keep(client(1), "../../etc/passwd".to_owned(), 7)
}

fn request(file: &str) -> BatchRequest {
    BatchRequest { input_file_id: file.to_owned(), endpoint: BatchEndpoint::Chat, metadata: None }
}

#[test]
fn files_outlive_the_process_and_belong_to_one_client() {
    let folder = Folder::new("files");
    let storage = folder.open();
    let object = stored(&storage, b"hello").unwrap();
    assert_eq!((object.bytes, object.filename.as_str()), (5, "../../etc/passwd"));
    drop(storage);
    let storage = folder.open();
    assert_eq!(storage.files(client(1)), std::slice::from_ref(&object));
    let (_, mut file) = storage.content(client(1), &object.id).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    assert!(storage.files(client(2)).is_empty());
    assert!(matches!(storage.content(client(2), &object.id), Err(StorageError::NoSuchFile(_))));
    assert!(matches!(storage.delete_file(client(2), &object.id), Err(StorageError::NoSuchFile(_))));
    for id in ["../lock", "file-../../version", "", "file-0"] {
        assert!(matches!(storage.content(client(1), id), Err(StorageError::NoSuchFile(_))), "{id}");
    }
    storage.delete_file(client(1), &object.id).unwrap();
    assert_eq!(folder.data_files(), 0);
}

#[test]
fn what_is_too_large_leaves_nothing() {
    let folder = Folder::new("limits");
    let storage = folder.open();
    assert_eq!(stored(&storage, &[b'x'; 101]), Err(StorageError::TooLarge(100)));
    stored(&storage, &[b'x'; 100]).unwrap();
    stored(&storage, &[b'x'; 100]).unwrap();
    assert_eq!(stored(&storage, &[b'x'; 60]), Err(StorageError::Full(250)));
    assert_eq!(folder.data_files(), 4, "two files of two parts");
    stored(&storage, &[b'x'; 50]).unwrap();
}

#[test]
fn a_directory_has_one_server_and_one_layout() {
    let folder = Folder::new("lock");
    let storage = folder.open();
    let limits = StorageLimits { max_file_bytes: 1, max_total_bytes: 1 };
    let error = Storage::open(&folder.0, limits).unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
    drop(storage);
    fs::write(folder.0.join("version"), "bitnet-data 9\n").unwrap();
    let error = Storage::open(&folder.0, limits).unwrap_err().to_string();
    assert!(error.contains("bitnet-data 9"), "{error}");
}

const ANSWER_A: &[u8] = br#"{"custom_id":"a","response":{"body":{"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12,"prompt_tokens_details":{"cached_tokens":2}}}}}
"#;

#[test]
fn half_a_line_is_cut_off_and_whole_ones_are_done() {
    let folder = Folder::new("answers");
    let storage = folder.open();
    let input = stored(&storage, b"in").unwrap();
    let batch = storage.create_batch(client(1), request(&input.id), 9).unwrap();
    assert!(matches!(storage.delete_file(client(1), &input.id), Err(StorageError::InUse(_))));
    let open = storage.open_batches().remove(0);
    let (mut answers, done) = storage.answers(&open).unwrap();
    assert!(done.is_empty());
    answers.add(Outcome::Answered, ANSWER_A).unwrap();
    answers.add(Outcome::Failed, b"{\"custom_id\":\"b\"}\n").unwrap();
    let path = storage.data_path(&open.answers.as_ref().unwrap()[0]);
    drop((answers, storage));
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend_from_slice(b"{\"custom_id\":\"c\"");
    fs::write(&path, bytes).unwrap();

    let storage = folder.open();
    let open = storage.open_batches().remove(0);
    let (mut answers, done) = storage.answers(&open).unwrap();
    assert_eq!(done, ["a", "b"].map(str::to_owned).into());
    assert_eq!(storage.batch(client(1), &batch.id).unwrap().request_counts.completed, 1);
    let usage = storage.batch(client(1), &batch.id).unwrap().usage;
    let cached = usage.input_tokens_details.cached_tokens;
    assert_eq!((usage.input_tokens, cached, usage.output_tokens, usage.total_tokens), (7, 2, 5, 12));
    answers.add(Outcome::Answered, b"{\"custom_id\":\"c\"}\n").unwrap();
    let [output, errors] = answers.finish(11).unwrap();
    let (object, mut file) = storage.content(client(1), &output.unwrap()).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text.as_bytes(), [ANSWER_A, b"{\"custom_id\":\"c\"}\n"].concat());
    assert_eq!((object.bytes, object.purpose), (text.len() as u64, FilePurpose::BatchOutput));
    assert!(storage.file(client(1), &errors.unwrap()).is_ok());
}

#[test]
fn answers_that_find_no_room_leave_nothing() {
    let folder = Folder::new("full");
    let storage = folder.open();
    let input = stored(&storage, &[b'x'; 100]).unwrap();
    storage.create_batch(client(1), request(&input.id), 9).unwrap();
    let (mut answers, _) = storage.answers(&storage.open_batches()[0]).unwrap();
    let line = [b"{\"custom_id\":\"a\",\"x\":\"".to_vec(), vec![b'y'; 160], b"\"}\n".to_vec()].concat();
    assert_eq!(answers.add(Outcome::Answered, &line), Err(StorageError::Full(250)));
    assert_eq!(answers.finish(1).unwrap(), [None, None]);
}

#[test]
fn a_batch_is_cancelled_once_and_by_its_owner() {
    let folder = Folder::new("cancel");
    let storage = folder.open();
    let input = stored(&storage, b"in").unwrap();
    assert!(matches!(storage.create_batch(client(2), request(&input.id), 1), Err(StorageError::NoSuchFile(_))));
    let batch = storage.create_batch(client(1), request(&input.id), 1).unwrap();
    assert!(matches!(storage.cancel_batch(client(2), &batch.id, 2), Err(StorageError::NoSuchBatch(_))));
    assert_eq!(storage.cancel_batch(client(1), &batch.id, 2).unwrap().status, BatchStatus::Cancelling);
    drop(storage);
    let storage = folder.open();
    let found = storage.batch(client(1), &batch.id).unwrap();
    assert_eq!((found.status, found.cancelling_at), (BatchStatus::Cancelling, Some(2)));
    storage.change_batch(&batch.id, |batch| batch.status = BatchStatus::Cancelled).unwrap();
    assert!(matches!(storage.cancel_batch(client(1), &batch.id, 3), Err(StorageError::Ended(_))));
    assert!(storage.open_batches().is_empty());
}
