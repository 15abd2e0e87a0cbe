{{/* Names are the release's own, so that two releases can live in two namespaces. */}}
{{- define "octavo.name" -}}
{{- printf "%s-operator" (.Release.Name | trunc 50 | trimSuffix "-") -}}
{{- end }}

{{- define "octavo.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "octavo.name" .) -}}
{{- end }}

{{- define "octavo.selector" -}}
app.kubernetes.io/name: octavo-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "octavo.labels" -}}
{{ include "octavo.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
