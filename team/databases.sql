-- The databases of a team's servers, each owned by the role of its server. It may be run again: what is there stays,
-- and passwords become those of the environment. The role `sweeps` is what members get, and opens no other database.
\set ON_ERROR_STOP on
\getenv mlflow_password MLFLOW_DB_PASSWORD
\getenv prefect_password PREFECT_DB_PASSWORD
\getenv sweeps_password SWEEPS_DB_PASSWORD

SELECT format('CREATE ROLE %I LOGIN', name)
FROM unnest(ARRAY['mlflow', 'prefect', 'sweeps']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE mlflow PASSWORD :'mlflow_password';
ALTER ROLE prefect PASSWORD :'prefect_password';
ALTER ROLE sweeps PASSWORD :'sweeps_password';

SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
FROM (VALUES ('mlflow', 'mlflow'), ('mlflow_auth', 'mlflow'), ('prefect', 'prefect'), ('sweeps', 'sweeps'))
    AS wanted (name, owner)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec

REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, prefect, sweeps FROM PUBLIC;
