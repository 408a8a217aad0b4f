// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The API's description (OpenAPI 3.1), made from the types that the API really speaks.

use super::api;
use crate::node::status::{
    ChunkCounts, Denied, IoCounts, MigrationRequest, MigrationState, MigrationStatus, ResizeRequest, Side,
    SourceLossPolicy, SourceStatus, StartMode, StrategyName, VolumeStatus,
};
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "blkferryd",
        description = "Control of one volume and of its migration. HTTP/1.1 over the UNIX socket given by --api-socket."
    ),
    paths(
        api::get_volume,
        api::put_volume,
        api::get_migration,
        api::put_migration,
        api::delete_migration,
        api::get_events,
        api::get_metrics,
        api::get_openapi
    ),
    components(schemas(
        VolumeStatus,
        ChunkCounts,
        IoCounts,
        SourceStatus,
        SourceLossPolicy,
        ResizeRequest,
        MigrationRequest,
        MigrationStatus,
        MigrationState,
        Side,
        StrategyName,
        StartMode,
        Denied
    ))
)]
struct Document;

/// The document that GET `/openapi.json` answers with.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}
