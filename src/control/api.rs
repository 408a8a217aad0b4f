// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The HTTP API: routes, the limits of what may be asked, and how a refusal looks.
//!
//! | method and path | answer |
//! |---|---|
//! | GET `/api/v1/volume` | 200 [`VolumeStatus`] |
//! | PUT `/api/v1/volume` | 200 [`VolumeStatus`] with the new size |
//! | GET `/api/v1/migration` | 200 [`MigrationStatus`], state `none` without one |
//! | PUT `/api/v1/migration` | 202 [`MigrationStatus`] of the armed migration |
//! | DELETE `/api/v1/migration` | 202 [`MigrationStatus`] |
//! | GET `/api/v1/events` | 200 server-sent events, see [`super::events`] |
//! | GET `/metrics`, `/openapi.json` | 200 |
//!
//! Every refusal is a [`Denied`] with a fitting HTTP status. The body is parsed whatever its `Content-Type` says, so that
//! plain `curl -d` works; unknown and doubled fields are refused, because a mistyped `bandwith` that is silently
//! ignored fills somebody's link.
//!
//! The answer to PUT waits for a snapshot that shows the new migration. Otherwise a caller that asks right after
//! could see the end of the *previous* migration and take it for the end of this one.

use super::{events, metrics, openapi, words};
use crate::config::MAX_CONNECTIONS;
use crate::node::status::{
    Command, Denied, MigrationRequest, MigrationStatus, NodeHandle, ResizeRequest, Snapshot, StrategyName,
    VolumeStatus,
};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use prometheus_client::registry::Registry;
use serde::de::DeserializeOwned;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};

/// Longest request body in bytes.
pub const MAX_BODY: usize = 16 << 10;
/// Longest `destination_url` in bytes: a host name has at most 253, a port 5.
pub const MAX_URL: usize = 300;
/// How long the node may take to accept or refuse a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an answer waits for the snapshot that shows its effect.
const EFFECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long connections may take to end after the shutdown began.
const GRACE: Duration = Duration::from_secs(2);

/// What every handler shares.
#[derive(Debug, Clone)]
struct Api {
    node: NodeHandle,
    registry: Arc<Registry>,
    stopping: watch::Receiver<bool>,
}

/// Serves the API until `shutdown` resolves; then event streams end, requests under way get two seconds, and the
/// listener closes. The node's metrics are added to what `registry` holds already.
///
/// Must run inside a tokio runtime; a current-thread one will do.
///
/// # Errors
/// What the listener reports when it cannot go on.
pub async fn serve(
    listener: UnixListener,
    node: NodeHandle,
    mut registry: Registry,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    metrics::register(&mut registry, node.snapshots.clone());
    let (stop, stopping) = watch::channel(false);
    let mut stopped = stopping.clone();
    let app = router(Api { node, registry: Arc::new(registry), stopping });
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        shutdown.await;
        stop.send_replace(true);
    });
    let overdue = async move {
        if stopped.wait_for(|stop| *stop).await.is_ok() {
            sleep(GRACE).await;
        }
    };
    tokio::select! {
        served = server.into_future() => served,
        () = overdue => Ok(()),
    }
}

fn router(api: Api) -> Router {
    Router::new()
        .route("/api/v1/volume", get(get_volume).put(put_volume))
        .route("/api/v1/migration", get(get_migration).put(put_migration).delete(delete_migration))
        .route("/api/v1/events", get(get_events))
        .route("/metrics", get(get_metrics))
        .route("/openapi.json", get(get_openapi))
        .fallback(|| async { Refusal(Denied::new("not-found", "no such path; see /openapi.json")) })
        .method_not_allowed_fallback(|| async {
            Refusal(Denied::new(
                "method-not-allowed",
                "this path does not take that method; see /openapi.json",
            ))
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(api)
}

/// A refusal on its way out.
#[derive(Debug)]
struct Refusal(Denied);

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        Self(denied)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (status_of(&self.0.code), Json(self.0)).into_response()
    }
}

/// The HTTP status of a refusal. Codes that this table does not know are the daemon's fault.
fn status_of(code: &str) -> StatusCode {
    match code {
        "invalid" => StatusCode::BAD_REQUEST,
        "none" | "not-found" => StatusCode::NOT_FOUND,
        "method-not-allowed" => StatusCode::METHOD_NOT_ALLOWED,
        "busy" | "not-owner" | "handed-over" | "faulty" | "not-whole" => StatusCode::CONFLICT,
        "too-large" => StatusCode::PAYLOAD_TOO_LARGE,
        "not-supported" | "shrink" | "limit" => StatusCode::UNPROCESSABLE_ENTITY,
        "no-space" => StatusCode::INSUFFICIENT_STORAGE,
        "stopping" => StatusCode::SERVICE_UNAVAILABLE,
        "timeout" => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[utoipa::path(get, path = "/api/v1/volume", tag = "volume",
    responses((status = 200, description = "The volume as it is now.", body = VolumeStatus)))]
async fn get_volume(State(api): State<Api>) -> Json<VolumeStatus> {
    api.node.refresh().await;
    Json(api.node.snapshots.borrow().volume.clone())
}

#[utoipa::path(put, path = "/api/v1/volume", tag = "volume", request_body = ResizeRequest,
    responses(
        (status = 200, description = "The volume has that size, durably.", body = VolumeStatus),
        (status = 400, description = "`invalid`", body = Denied),
        (status = 409, description = "`busy`, `not-owner`, `handed-over` or `faulty`", body = Denied),
        (status = 413, description = "`too-large`: the request", body = Denied),
        (status = 422, description = "`shrink` or `limit`", body = Denied),
        (status = 500, description = "`internal`", body = Denied),
        (status = 503, description = "`stopping`", body = Denied),
        (status = 504, description = "`timeout`", body = Denied),
        (status = 507, description = "`no-space`", body = Denied)))]
async fn put_volume(
    State(api): State<Api>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<VolumeStatus>, Refusal> {
    let body = body.map_err(|rejection| refuse_body(&rejection))?;
    let request: ResizeRequest = parse(&body, "a resize request")?;
    command(&api.node, |reply| Command::Resize(request.size, reply)).await?;
    // The node publishes before anything else happens; a later resize may have come in between.
    wait_for(&api.node, |snapshot| snapshot.volume.size >= request.size).await;
    Ok(Json(api.node.snapshots.borrow().volume.clone()))
}

#[utoipa::path(get, path = "/api/v1/migration", tag = "migration",
    responses((status = 200, description = "The newest migration; state `none` without one.", body = MigrationStatus)))]
async fn get_migration(State(api): State<Api>) -> Json<MigrationStatus> {
    api.node.refresh().await;
    Json(api.node.snapshots.borrow().migration.clone())
}

#[utoipa::path(put, path = "/api/v1/migration", tag = "migration", request_body = MigrationRequest,
    responses(
        (status = 202, description = "Armed; follow it by events or by GET.", body = MigrationStatus),
        (status = 400, description = "`invalid`", body = Denied),
        (status = 409, description = "`busy`, `not-owner` or `handed-over`", body = Denied),
        (status = 413, description = "`too-large`", body = Denied),
        (status = 422, description = "`not-supported`", body = Denied),
        (status = 500, description = "`internal`", body = Denied),
        (status = 503, description = "`stopping`", body = Denied),
        (status = 504, description = "`timeout`", body = Denied)))]
async fn put_migration(
    State(api): State<Api>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<MigrationStatus>), Refusal> {
    let body = body.map_err(|rejection| refuse_body(&rejection))?;
    let request: MigrationRequest = parse(&body, "a migration request")?;
    check(&request)?;
    let before = api.node.snapshots.borrow().migration.id.clone();
    command(&api.node, |reply| Command::Migrate(request, reply)).await?;
    let shown =
        |snapshot: &Snapshot| snapshot.migration.id != before || words::is_running(snapshot.migration.state);
    Ok((StatusCode::ACCEPTED, Json(after(&api.node, shown).await)))
}

#[utoipa::path(delete, path = "/api/v1/migration", tag = "migration",
    responses(
        (status = 202, description = "The cancel was accepted.", body = MigrationStatus),
        (status = 404, description = "`none`: there is no migration", body = Denied),
        (status = 409, description = "`handed-over`: the destination owns the disk; or `not-owner`", body = Denied),
        (status = 500, description = "`internal`", body = Denied),
        (status = 503, description = "`stopping`", body = Denied),
        (status = 504, description = "`timeout`", body = Denied)))]
async fn delete_migration(State(api): State<Api>) -> Result<(StatusCode, Json<MigrationStatus>), Refusal> {
    command(&api.node, Command::Cancel).await?;
    let shown = |snapshot: &Snapshot| !words::is_running(snapshot.migration.state);
    Ok((StatusCode::ACCEPTED, Json(after(&api.node, shown).await)))
}

#[utoipa::path(get, path = "/api/v1/events", tag = "events",
    responses((status = 200, description = "Server-sent events `volume` (VolumeStatus) and `migration` \
        (MigrationStatus): one of each at once, then one for each change.", body = String,
        content_type = "text/event-stream")))]
async fn get_events(State(api): State<Api>) -> Response {
    events::stream(api.node, api.stopping).into_response()
}

#[utoipa::path(get, path = "/metrics", tag = "metrics",
    responses((status = 200, description = "Metrics in the OpenMetrics text format.", body = String,
        content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8")))]
async fn get_metrics(State(api): State<Api>) -> Result<Response, Refusal> {
    api.node.refresh().await;
    let text = metrics::text(&api.registry).map_err(|error| Denied::new("internal", error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

#[utoipa::path(get, path = "/openapi.json", tag = "metrics",
    responses((status = 200, description = "This description.", body = Object, content_type = "application/json")))]
async fn get_openapi() -> Response {
    Json(openapi::document()).into_response()
}

/// Gives a command to the node and waits for its word.
async fn command(
    node: &NodeHandle,
    make: impl FnOnce(oneshot::Sender<Result<(), Denied>>) -> Command,
) -> Result<(), Denied> {
    let stopping = || Denied::new("stopping", "the daemon is stopping");
    let (reply, answer) = oneshot::channel();
    let asked = async {
        node.commands.send(make(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    };
    timeout(COMMAND_TIMEOUT, asked).await.unwrap_or_else(|_| {
        Err(Denied::new("timeout", "no answer within 60 s; GET tells whether it took effect"))
    })
}

/// The migration as it is once `shown` holds, or as it is after a while.
async fn after(node: &NodeHandle, shown: impl FnMut(&Snapshot) -> bool) -> MigrationStatus {
    wait_for(node, shown).await;
    node.snapshots.borrow().migration.clone()
}

/// Waits for a snapshot that shows the effect of a command.
async fn wait_for(node: &NodeHandle, shown: impl FnMut(&Snapshot) -> bool) {
    let mut snapshots = node.snapshots.clone();
    // A time-out is no error: the newest snapshot is the honest answer either way.
    let _ = timeout(EFFECT_TIMEOUT, snapshots.wait_for(shown)).await.map(|seen| seen.is_ok());
}

fn refuse_body(rejection: &BytesRejection) -> Denied {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        Denied::new("too-large", format!("a request has at most {MAX_BODY} bytes"))
    } else {
        Denied::new("invalid", rejection.body_text())
    }
}

fn parse<T: DeserializeOwned>(body: &[u8], what: &str) -> Result<T, Denied> {
    serde_json::from_slice(body).map_err(|error| Denied::new("invalid", format!("not {what}: {error}")))
}

/// Checks what can be checked without the node: ranges, the form of the address, strategies that no daemon of this
/// version has.
fn check(request: &MigrationRequest) -> Result<(), Denied> {
    let invalid = |text: String| Err(Denied::new("invalid", text));
    let url = request.destination_url.as_str();
    if url.len() > MAX_URL {
        return invalid(format!("destination_url has more than {MAX_URL} bytes"));
    }
    let address = url.strip_prefix("tcp:").unwrap_or(url);
    if !is_host_and_port(address) {
        return invalid(format!("destination_url {url:?} is not HOST:PORT or tcp:HOST:PORT"));
    }
    if let Some(connections) = request.connections
        && !(1..=MAX_CONNECTIONS).contains(&connections)
    {
        return invalid(format!("connections {connections} is not allowed: 1 to {MAX_CONNECTIONS}"));
    }
    match request.strategy {
        StrategyName::Hybrid | StrategyName::Precopy | StrategyName::Postcopy => Ok(()),
        StrategyName::Mirror | StrategyName::Shared => Err(Denied::new(
            "not-supported",
            format!(
                "strategy {} is not in this version: hybrid, precopy or postcopy",
                words::strategy_word(request.strategy)
            ),
        )),
    }
}

/// Whether `address` has the form `HOST:PORT` or `[V6]:PORT` with a port that can be connected to.
fn is_host_and_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let port = !port.starts_with('+') && port.parse::<u16>().is_ok_and(|port| port != 0);
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').is_some_and(|v6| v6.parse::<std::net::Ipv6Addr>().is_ok()),
        None => {
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
        }
    };
    port && host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(request: MigrationRequest) -> Result<(), String> {
        check(&request).map_err(|denied| denied.code)
    }

    fn to(url: &str) -> MigrationRequest {
        MigrationRequest {
            destination_url: url.to_owned(),
            strategy: StrategyName::Hybrid,
            threshold: None,
            connections: None,
            bandwidth: None,
            start: crate::node::status::StartMode::Now,
        }
    }

    #[test]
    fn addresses_are_a_host_and_a_port() {
        for url in
            ["h:1", "tcp:h:65535", "10.0.0.2:7000", "[::1]:7000", "tcp:[fe80::1]:9", "my-host_2.example:80"]
        {
            assert_eq!(code(to(url)), Ok(()), "{url}");
        }
        let long = format!("{}:1", "a".repeat(MAX_URL));
        let bad = [
            "",
            ":1",
            "h",
            "h:",
            "h:0",
            "h:65536",
            "h:+1",
            "h:x",
            "unix:/p",
            "http://h:1",
            "::1:7",
            "[h]:1",
            "a b:1",
        ];
        for url in bad.into_iter().chain([long.as_str()]) {
            assert_eq!(code(to(url)), Err("invalid".to_owned()), "{url}");
        }
    }

    #[test]
    fn connections_are_bounded() {
        for (connections, good) in
            [(0, false), (1, true), (MAX_CONNECTIONS, true), (MAX_CONNECTIONS + 1, false)]
        {
            let request = MigrationRequest { connections: Some(connections), ..to("h:1") };
            assert_eq!(code(request).is_ok(), good, "{connections}");
        }
    }

    #[test]
    fn strategies_that_are_not_there_are_refused_by_name() {
        for strategy in [StrategyName::Mirror, StrategyName::Shared] {
            assert_eq!(code(MigrationRequest { strategy, ..to("h:1") }), Err("not-supported".to_owned()));
        }
        for strategy in [StrategyName::Hybrid, StrategyName::Precopy, StrategyName::Postcopy] {
            assert_eq!(code(MigrationRequest { strategy, ..to("h:1") }), Ok(()));
        }
    }

    #[test]
    fn a_code_without_a_status_is_the_daemons_fault() {
        assert_eq!(status_of("internal"), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(status_of("something-new"), StatusCode::INTERNAL_SERVER_ERROR);
    }
}
