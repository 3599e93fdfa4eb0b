//! The key file: who may call. Secrets are hashed the moment they are read; only digests stay in memory.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
};

use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::ConfigError;

/// Who a request counts for: a key, or an address where no keys are set. Opaque and short, so tables of them stay
/// small and nothing personal is kept; prints as 16 hex digits for logs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId([u8; 16]);

impl ClientId {
    /// The client behind an address: an IPv4 address, or the /64 network of an IPv6 one (a host owns a whole /64).
    pub fn from_address(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::digest(b"v4", &v4.octets()),
            IpAddr::V6(v6) => Self::digest(b"v6", &v6.octets()[..8]),
        }
    }

    /// This machine: what the server asks of itself.
    pub fn local() -> Self {
        Self::from_address(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// All of it in hexadecimal digits, for records that outlive the process.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Who works off in the background what the client of `hex` handed in.
    pub fn background(hex: &str) -> Self {
        Self::digest(b"background", hex.as_bytes())
    }

    /// The bytes, for salts.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    fn from_key_name(name: &str) -> Self {
        Self::digest(b"key", name.as_bytes())
    }

    fn digest(kind: &[u8], identity: &[u8]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(kind);
        hasher.update([0]);
        hasher.update(identity);
        let digest: [u8; 32] = hasher.finalize().into();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        Self(id)
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientId({self})")
    }
}

/// The keys of a key file. An empty set asks for none.
#[derive(Clone, Default)]
pub struct KeySet {
    keys: Arc<[Key]>,
}

struct Key {
    name: String,
    digest: [u8; 32],
}

impl KeySet {
    /// Reads a key file: one key a line, `name:secret` or `name:sha256:HEX`; blank lines and `#` comments are skipped.
    ///
    /// # Errors
    /// [`ConfigError::File`], naming the line and never its secret.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let mut keys: Vec<Key> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let refused =
                |why: &str| ConfigError::File { path: origin.to_owned(), reason: format!("line {}: {why}", index + 1) };
            let key = parse_line(line).map_err(refused)?;
            if keys.iter().any(|other| other.name == key.name) {
                return Err(refused("a second key of this name"));
            }
            keys.push(key);
        }
        if keys.is_empty() {
            let reason = "holds no key: write one a line as name:secret or name:sha256:HEX".to_owned();
            return Err(ConfigError::File { path: origin.to_owned(), reason });
        }
        Ok(Self { keys: keys.into() })
    }

    /// Reads the key file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`] when it cannot be read or parsed.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
            setting: "api-key-file",
            path: origin.clone(),
            reason: error.to_string(),
        })?;
        Self::parse(&text, &origin)
    }

    /// Whether no key is asked for.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The client whose secret was presented. Digests are compared, all of them, in constant time: neither how much
    /// of a secret was right nor which key matched shows in the time taken.
    pub fn authenticate(&self, presented: &str) -> Option<ClientId> {
        let digest: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        let mut found = 0_u32;
        for (index, key) in (1_u32..).zip(self.keys.iter()) {
            found.conditional_assign(&index, key.digest.ct_eq(&digest));
        }
        let key = self.keys.get(found.checked_sub(1)? as usize)?;
        Some(ClientId::from_key_name(&key.name))
    }
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySet({} keys)", self.keys.len())
    }
}

fn parse_line(line: &str) -> Result<Key, &'static str> {
    let (name, secret) = line.split_once(':').ok_or("expected name:secret or name:sha256:HEX")?;
    let (name, secret) = (name.trim(), secret.trim());
    if name.is_empty() || secret.is_empty() {
        return Err("neither the name nor the secret may be empty");
    }
    let digest = match secret.strip_prefix("sha256:") {
        Some(hex) => decode_sha256(hex).ok_or("sha256: needs 64 hexadecimal digits")?,
        None => Sha256::digest(secret.as_bytes()).into(),
    };
    Ok(Key { name: name.to_owned(), digest })
}

fn decode_sha256(hex: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = hex.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    if digits.len() != 64 {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Some(digest)
}
