//! Who gets in, sees and changes what: by the door, over a real database.

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
