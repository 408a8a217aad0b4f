// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! TLS with certificates in QEMU's folder layout, which migration hosts have already.
//!
//! `ca-cert.pem`; `server-cert.pem` and `server-key.pem` for a listener; `client-cert.pem` and `client-key.pem` for who
//! connects; `ca-crl.pem` if certificates have been revoked. Both sides must show a certificate: a guest's disk
//! is neither given to nor taken from a stranger, and a flag to do without would be found in somebody's set-up. Files are read
//! when a listener starts and at each connecting, so renewed certificates need no restart of a source.
//!
//! One crypto provider is named here instead of a process default, which two libraries could set against each other.

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream as ClientStream;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// Why TLS cannot be used; each names the file or the folder.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read, or is not what its name says.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: pem::Error,
    },
    /// A file has no certificate in it.
    #[error("{0}: no certificate in this file")]
    Empty(PathBuf),
    /// A certificate of the authority cannot be used.
    #[error("{path}: {error}")]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        error: rustls::Error,
    },
    /// The authority or its revocation list cannot be used to check the peer.
    #[error("{dir}: ca-cert.pem or ca-crl.pem: {error}")]
    Verifier {
        /// The folder.
        dir: PathBuf,
        /// Why.
        error: VerifierBuilderError,
    },
    /// The certificate and its key cannot be used.
    #[error("{cert} with its key: {error}")]
    Identity {
        /// The certificate.
        cert: PathBuf,
        /// Why.
        error: rustls::Error,
    },
}

/// TLS for a listener; cheap to clone.
#[derive(Clone)]
pub struct TlsServer(TlsAcceptor);

/// TLS for who connects; cheap to clone.
#[derive(Clone)]
pub struct TlsClient(TlsConnector);

impl std::fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsServer")
    }
}

impl std::fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsClient")
    }
}

impl TlsServer {
    /// Reads `server-cert.pem`, `server-key.pem`, `ca-cert.pem` and, if it is there, `ca-crl.pem`.
    ///
    /// # Errors
    /// A [`TlsError`] that names the file.
    pub fn from_dir(dir: &Path) -> Result<Self, TlsError> {
        let provider = provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(dir)?, provider.clone())
            .with_crls(revoked(dir)?)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| TlsError::Verifier { dir: dir.to_owned(), error })?;
        let (cert, chain, key) = identity(dir, "server")?;
        let failed = |error| TlsError::Identity { cert, error };
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_client_cert_verifier(verifier).with_single_cert(chain, key))
            .map_err(failed)?;
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// The listener's side of the handshake.
    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.0
            .accept(stream)
            .await
            .map(TlsStream::from)
            .map_err(|error| io::Error::new(error.kind(), format!("TLS handshake: {error}")))
    }
}

impl TlsClient {
    /// Reads `client-cert.pem`, `client-key.pem`, `ca-cert.pem` and, if it is there, `ca-crl.pem`.
    ///
    /// # Errors
    /// A [`TlsError`] that names the file.
    pub fn from_dir(dir: &Path) -> Result<Self, TlsError> {
        let provider = provider();
        let verifier = WebPkiServerVerifier::builder_with_provider(roots(dir)?, provider.clone())
            .with_crls(revoked(dir)?)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| TlsError::Verifier { dir: dir.to_owned(), error })?;
        let (cert, chain, key) = identity(dir, "client")?;
        let failed = |error| TlsError::Identity { cert, error };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_webpki_verifier(verifier).with_client_auth_cert(chain, key))
            .map_err(failed)?;
        Ok(Self::from_config(config))
    }

    fn from_config(config: ClientConfig) -> Self {
        Self(TlsConnector::from(Arc::new(config)))
    }

    /// A client that knows the authority of `dir` but shows no certificate.
    #[cfg(test)]
    pub(super) fn anonymous(dir: &Path) -> Result<Self, TlsError> {
        let failed = |error| TlsError::Authority { path: dir.to_owned(), error };
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let config = builder.map_err(failed)?.with_root_certificates(roots(dir)?).with_no_client_auth();
        Ok(Self::from_config(config))
    }

    /// The connecting side of the handshake; the listener's certificate must be for `host`.
    pub(super) async fn connect(&self, host: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let stream: ClientStream<TcpStream> = self.0.connect(name, stream).await?;
        Ok(TlsStream::from(stream))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error| TlsError::File { path: path.to_owned(), error };
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)?;
    if found.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(found) }
}

fn roots(dir: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let path = dir.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|error| TlsError::Authority { path: path.clone(), error })?;
    }
    Ok(Arc::new(roots))
}

fn revoked(dir: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let path = dir.join("ca-crl.pem");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let failed = |error| TlsError::File { path: path.clone(), error };
    CertificateRevocationListDer::pem_file_iter(&path)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)
}

type Identity = (PathBuf, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(dir: &Path, side: &str) -> Result<Identity, TlsError> {
    let cert = dir.join(format!("{side}-cert.pem"));
    let path = dir.join(format!("{side}-key.pem"));
    let chain = certificates(&cert)?;
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|error| TlsError::File { path, error })?;
    Ok((cert, chain, key))
}
