//! Access: sign-in, permissions and the audit log, through HTTP, over a real database.

mod activity;
mod audit;
mod browser;
mod every_route;
mod flood;
mod invitations;
mod oidc;
mod repeated;
mod roles;
mod sign_in;
mod tenancy;
mod tokens;
mod web;
